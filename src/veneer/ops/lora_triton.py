"""A low-rank pair's products on CUDA in Triton, each in one pass over x or y.

`down`, `into` and `across` recompute dropout's mask where they use it, word for word that of `dropout.words`, and round
A to the dtype of the products where they read it, so neither is ever written. `up` is there because torch.addmm copies
y before it adds to it (PyTorch 2.13); `few` is one launch in place of several for the few tokens of a step of
generation. The products of the frozen weight stay cuBLAS', and autograd adds its gradient of x to that of `into`.

Products are those of the reference: factors in the dtype of the activations, sums in float32, rounded once. Only `few`
does not round in between. None of these kernels has run on a GPU; what tests hold is that they compile for compute
capabilities 8.0 and 9.0, and their numbers in Triton's interpreter, which runs on a CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FUSED = {"enable_fp_fusion": True}
"""A product and the sum it goes into are rounded once: Triton 3.9 wants to be told, and from 3.10 on would not."""
SPLIT = 1024
"""Tokens whose products one program of `across` adds up."""
ITEMS = 8192
"""Numbers of a factor that a program of `few` holds at once, and elements of x that one of `drop` reads."""

# Triton reads annotations, and knows its own only
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"


@triton.jit
def multiply(a, b, total, dtype: tl.constexpr):
    """total + a·b of numbers rounded to a dtype, in float32."""
    a, b = a.to(dtype), b.to(dtype)
    if INTERPRETED:  # whose NumPy has no bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _words(number, seed):
    """Random words, as `dropout.words`."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    z = number.to(tl.uint32) * 0x9E3779B9 + low
    z = (z ^ (z >> 16)) * 0x7FEB352D + high
    z = (z ^ (z >> 15)) * 0x31848BAB
    return z ^ (z >> 16)


@triton.jit
def _kept(rows, start, width, seed, threshold, columns: tl.constexpr, even: tl.constexpr):
    """Which elements of these rows and of `columns` columns from `start` on are kept, as `dropout.kept`."""
    if even:  # each word serves two neighbours
        number = (rows * width // 2)[:, None] + start // 2 + tl.arange(0, columns // 2)[None, :]
        word = _words(number, tl.load(seed))
        lane = tl.interleave(word & 0xFFFF, word >> 16)
    else:
        number = (rows * width)[:, None] + start + tl.arange(0, columns)[None, :]
        lane = (_words(number >> 1, tl.load(seed)) >> ((number & 1) * 16).to(tl.uint32)) & 0xFFFF
    return lane >= threshold


@triton.jit
def narrow(
    x, A, h, seed, threshold, tokens, width, rank, by_rank, by_column,
    rows: tl.constexpr, columns: tl.constexpr, ranks: tl.constexpr, dropping: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """h = dropout(x)·Aᵀ for `rows` tokens and `ranks` ranks: x [tokens, width], A [rank, width] by its strides."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    number = tl.program_id(1) * ranks + tl.arange(0, ranks)
    total = tl.zeros((rows, ranks), tl.float32)
    for start in range(0, width, columns):
        column = start + tl.arange(0, columns)
        there = (row < tokens)[:, None] & (column < width)[None, :]
        values = tl.load(x + row[:, None] * width + column[None, :], mask=there, other=0.0)
        if dropping:
            values = tl.where(_kept(row, start, width, seed, threshold, columns, even), values, 0.0)
        at = number[None, :] * by_rank + column[:, None] * by_column
        factor = tl.load(A + at, mask=(number < rank)[None, :] & (column < width)[:, None], other=0.0)
        total = multiply(values, factor, total, h.dtype.element_ty)
    to = h + row[:, None] * rank + number[None, :]
    tl.store(to, total.to(h.dtype.element_ty), mask=(row < tokens)[:, None] & (number < rank)[None, :])


@triton.jit
def widen(
    h, factor, y, to, seed, threshold, scale, tokens, width, rank, by_rank, by_column,
    rows: tl.constexpr, columns: tl.constexpr, ranks: tl.constexpr,
    adding: tl.constexpr, dropping: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """y + scale·h·F, or dropout(h·F): h [tokens, rank], F [rank, width] by its strides, y and `to` [tokens, width]."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    start = tl.program_id(1) * columns
    column = start + tl.arange(0, columns)
    there = (row < tokens)[:, None] & (column < width)[None, :]
    total = tl.zeros((rows, columns), tl.float32)
    for first in range(0, rank, ranks):
        number = first + tl.arange(0, ranks)
        mine = (row < tokens)[:, None] & (number < rank)[None, :]
        left = tl.load(h + row[:, None] * rank + number[None, :], mask=mine, other=0.0)
        at = number[:, None] * by_rank + column[None, :] * by_column
        right = tl.load(factor + at, mask=(number < rank)[:, None] & (column < width)[None, :], other=0.0)
        total = multiply(left, right, total, h.dtype.element_ty)
    at = row[:, None] * width + column[None, :]
    if adding:
        total = tl.load(y + at, mask=there, other=0.0).to(tl.float32) + total * scale
    if dropping:
        total = tl.where(_kept(row, start, width, seed, threshold, columns, even), total, 0.0)
    tl.store(to + at, total.to(to.dtype.element_ty), mask=there)


@triton.jit
def outer(
    h, x, sums, seed, threshold, tokens, width, rank, split,
    rows: tl.constexpr, columns: tl.constexpr, ranks: tl.constexpr,
    dropping: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """hᵀ·dropout(x) over each `split` tokens: h [tokens, rank], x [tokens, width], sums [splits, rank, width]."""
    start = tl.program_id(0) * columns
    column = start + tl.arange(0, columns)
    number = tl.program_id(1) * ranks + tl.arange(0, ranks)
    part = tl.program_id(2).to(tl.int64)
    total = tl.zeros((ranks, columns), tl.float32)
    for first in range(0, split, rows):
        row = part * split + first + tl.arange(0, rows)
        mine = (number < rank)[:, None] & (row < tokens)[None, :]
        left = tl.load(h + row[None, :] * rank + number[:, None], mask=mine, other=0.0)
        there = (row < tokens)[:, None] & (column < width)[None, :]
        values = tl.load(x + row[:, None] * width + column[None, :], mask=there, other=0.0)
        if dropping:
            values = tl.where(_kept(row, start, width, seed, threshold, columns, even), values, 0.0)
        total = multiply(left, values, total, h.dtype.element_ty)
    to = sums + (part * rank + number)[:, None] * width + column[None, :]
    tl.store(to, total, mask=(number < rank)[:, None] & (column < width)[None, :])


@triton.jit
def one(
    x, A, B, y, to, scale, width, out, rank,
    columns: tl.constexpr, outs: tl.constexpr, ranks: tl.constexpr,
):  # fmt: skip
    """y + scale·B(A(x)) of one token and `outs` outputs: A [rank, width] and B [out, rank], read whole and in rows."""
    token = tl.program_id(1).to(tl.int64)
    number = tl.arange(0, ranks)
    products = tl.zeros((ranks, columns), tl.float32)
    for start in range(0, width, columns):
        column = start + tl.arange(0, columns)
        values = tl.load(x + token * width + column, mask=column < width, other=0.0).to(tl.float32)
        there = (number < rank)[:, None] & (column < width)[None, :]
        factor = tl.load(A + number[:, None] * width + column[None, :], mask=there, other=0.0)
        products += factor.to(tl.float32) * values[None, :]
    output = tl.program_id(0) * outs + tl.arange(0, outs)
    there = (output < out)[:, None] & (number < rank)[None, :]
    factor = tl.load(B + output[:, None] * rank + number[None, :], mask=there, other=0.0).to(tl.float32)
    change = tl.sum(factor * tl.sum(products, 1)[None, :], 1)
    at = token * out + output
    total = tl.load(y + at, mask=output < out, other=0.0).to(tl.float32) + change * scale
    tl.store(to + at, total.to(to.dtype.element_ty), mask=output < out)


@triton.jit
def zero(x, to, seed, threshold, count, tile: tl.constexpr):
    """x without what is dropped, `tile` elements of it, an even number."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    at = row[:, None] * tile + tl.arange(0, tile)[None, :]
    values = tl.load(x + at, mask=at < count, other=0.0)
    values = tl.where(_kept(row, 0, tile, seed, threshold, tile, True), values, 0.0)
    tl.store(to + at, values, mask=at < count)


def down(x: Tensor, A: Tensor, dtype: torch.dtype, seed: Tensor | None, threshold: int) -> Tensor:
    """A(dropout(x)) in a dtype: x [*, in], A [rank, in], the answer [*, rank]."""
    x, tokens = x.contiguous(), _tokens(x)
    rank, width = A.shape
    h = x.new_empty(*x.shape[:-1], rank, dtype=dtype)
    sides = tile(tokens, rank, dtype)
    narrow[triton.cdiv(tokens, sides["rows"]), triton.cdiv(rank, sides["ranks"])](
        x, A, h, *_draw(x, seed, threshold), tokens, width, rank, *A.stride(), **sides, **_dropping(seed, width)
    )
    return h


def into(dh: Tensor, A: Tensor, dtype: torch.dtype, seed: Tensor | None, threshold: int) -> Tensor:
    """dropout(dh·A) in a dtype, the gradient of x: dh [*, rank], A [rank, in], the answer [*, in]."""
    dx = dh.new_empty(*dh.shape[:-1], A.shape[1], dtype=dtype)
    _widen(dh, A, dx, dx, seed, threshold, 1.0)
    return dx


def up(h: Tensor, y: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale·h·Bᵀ: h [*, rank], y [*, out], B [out, rank]."""
    to = torch.empty_like(y, memory_format=torch.contiguous_format)
    _widen(h, B.T, y.contiguous(), to, None, 0, scale)
    return to


def _widen(h: Tensor, F: Tensor, y: Tensor, to: Tensor, seed: Tensor | None, threshold: int, scale: float) -> None:
    tokens, (rank, width) = _tokens(to), F.shape
    sides = tile(tokens, rank, h.dtype)
    widen[triton.cdiv(tokens, sides["rows"]), triton.cdiv(width, sides["columns"])](
        h.contiguous(), F, y, to, *_draw(to, seed, threshold), scale, tokens, width, rank, *F.stride(),
        **sides, adding=y is not to, **_dropping(seed, width),
    )  # fmt: skip


def across(dh: Tensor, x: Tensor, dtype: torch.dtype, seed: Tensor | None, threshold: int) -> Tensor:
    """dhᵀ·dropout(x) in a dtype, the gradient of A, in the same order each time: dh [*, rank], x [*, in]."""
    dh, x = dh.contiguous(), x.contiguous()
    tokens, rank, width = _tokens(x), dh.shape[-1], x.shape[-1]
    sides = tile(tokens, rank, dh.dtype)
    split = min(SPLIT, sides["rows"] * max(1, triton.cdiv(tokens, sides["rows"])))
    sums = x.new_empty(max(1, triton.cdiv(tokens, split)), rank, width, dtype=torch.float32)
    outer[triton.cdiv(width, sides["columns"]), triton.cdiv(rank, sides["ranks"]), len(sums)](
        dh, x, sums, *_draw(x, seed, threshold), tokens, width, rank, split, **sides, **_dropping(seed, width)
    )
    return sums.sum(0).to(dtype)


def few(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale·B(A(x)), summed in float32 and rounded once: x [*, in], y [*, out], A [rank, in], B [out, rank]."""
    to = torch.empty_like(y, memory_format=torch.contiguous_format)
    (rank, width), out = A.shape, len(B)
    ranks = triton.next_power_of_2(max(1, rank))
    columns, outs = min(512, max(16, ITEMS // ranks)), min(64, max(16, ITEMS // ranks))
    one[triton.cdiv(out, outs), _tokens(x)](
        x.contiguous(), A.contiguous(), B.contiguous(), y.contiguous(), to, scale, width, out, rank,
        columns=columns, outs=outs, ranks=ranks, **FUSED,
    )  # fmt: skip
    return to


def drop(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """As `dropout.reference`."""
    x = x.contiguous()
    to = torch.empty_like(x)
    zero[(triton.cdiv(x.numel(), ITEMS),)](x, to, seed, threshold, x.numel(), tile=ITEMS, **FUSED)
    return to


def _tokens(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def tile(tokens: int, rank: int, dtype: torch.dtype) -> dict[str, int]:
    """A tile's sides: no more than is needed, and in float32, which tensor cores round, few enough for registers."""
    side = 64 if dtype.itemsize == 2 else 32
    rows, ranks = (min(side, max(16, triton.next_power_of_2(max(1, count)))) for count in (tokens, rank))
    return {"rows": rows, "columns": side, "ranks": ranks}


def _draw(like: Tensor, seed: Tensor | None, threshold: int) -> tuple[Tensor, int]:
    return (like if seed is None else seed), threshold


def _dropping(seed: Tensor | None, width: int) -> dict[str, Any]:
    return {"dropping": seed is not None, "even": width % 2 == 0, **FUSED}
