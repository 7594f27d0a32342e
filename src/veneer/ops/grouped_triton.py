"""Rows of a batch under low-rank pairs of their own on CUDA in Triton: one launch by all A, one by all B.

Each A and B is read where it lies, through a table of addresses, so nothing is stacked or padded. Rows with the same
pairs form a group, whose tokens are computed in tiles; one that has several pairs gets the sum of them. What is
rounded, and what tests hold, is as in `lora_triton.py`. It has not run on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.lora_triton import FUSED, multiply, tile

# Triton reads annotations, and knows its own only
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"


@triton.jit
def _members(order, begin, count, tokens, first, rows: tl.constexpr):
    """The tokens of a group from number `first` on, each as its number in the batch, and which of them there are."""
    number = first + tl.arange(0, rows)
    there = number < count
    row = tl.load(order + begin + number // tokens, mask=there, other=0)
    return row * tokens + number % tokens, there


@triton.jit
def shrink(
    x, h, like, pairs, order, starts, tokens, width, depth, widest,
    rows: tl.constexpr, columns: tl.constexpr, ranks: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """h = A(x) in float32 for the tokens of a pair's group: h [batch · tokens, depth, widest]. Tables: see `Mixed`."""
    pair = pairs + tl.program_id(1) * 5
    A = tl.multiple_of(tl.load(pair).to(like.dtype), aligned)
    rank, group, level = tl.load(pair + 2), tl.load(pair + 3), tl.load(pair + 4)
    begin = tl.load(starts + group)
    count = (tl.load(starts + group + 1) - begin) * tokens
    first = tl.program_id(0) * rows
    start_rank = tl.program_id(2) * ranks
    if first >= count or start_rank >= rank:
        return
    token, there = _members(order, begin, count, tokens, first, rows)
    number = start_rank + tl.arange(0, ranks)
    total = tl.zeros((rows, ranks), tl.float32)
    for start in range(0, width, columns):
        column = start + tl.arange(0, columns)
        mine = there[:, None] & (column < width)[None, :]
        values = tl.load(x + token[:, None] * width + column[None, :], mask=mine, other=0.0)
        at = number[None, :] * width + column[:, None]
        factor = tl.load(A + at, mask=(number < rank)[None, :] & (column < width)[:, None], other=0.0)
        total = multiply(values, factor, total, x.dtype.element_ty)
    to = h + (token[:, None] * depth + level) * widest + number[None, :]
    tl.store(to, total, mask=there[:, None] & (number < rank)[None, :])


@triton.jit
def expand(
    h, y, to, like, pairs, scales, order, starts, turns, tokens, out, depth, widest,
    rows: tl.constexpr, columns: tl.constexpr, ranks: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """y + Σ scale·B(h) over the pairs of a group, for some of its tokens and outputs."""
    group = tl.program_id(1)
    begin = tl.load(starts + group)
    count = (tl.load(starts + group + 1) - begin) * tokens
    first = tl.program_id(0) * rows
    if first >= count:
        return
    token, there = _members(order, begin, count, tokens, first, rows)
    column = tl.program_id(2) * columns + tl.arange(0, columns)
    mine = there[:, None] & (column < out)[None, :]
    total = tl.load(y + token[:, None] * out + column[None, :], mask=mine, other=0.0).to(tl.float32)
    for turn in range(tl.load(turns + group), tl.load(turns + group + 1)):
        pair = pairs + turn * 5
        B = tl.multiple_of(tl.load(pair + 1).to(like.dtype), aligned)
        rank, level, scale = tl.load(pair + 2), tl.load(pair + 4), tl.load(scales + turn)
        for start in range(0, rank, ranks):
            number = start + tl.arange(0, ranks)
            at = (token[:, None] * depth + level) * widest + number[None, :]
            left = tl.load(h + at, mask=there[:, None] & (number < rank)[None, :], other=0.0)
            there_too = (number < rank)[:, None] & (column < out)[None, :]
            right = tl.load(B + column[None, :] * rank + number[:, None], mask=there_too, other=0.0)
            change = multiply(left, right, tl.zeros((rows, columns), tl.float32), y.dtype.element_ty)
            total += scale * change
    tl.store(to + token[:, None] * out + column[None, :], total.to(to.dtype.element_ty), mask=mine)


class Mixed:
    """Low-rank pairs (A, B, scale), and which of them each row of a batch gets, as the kernels read them.

    All are contiguous, in one dtype, and some row has one. It points to the pairs' own memory: other numbers there are
    read by the next call, other memory needs another of it.

    `order` are the rows by group, `starts` where each group begins among them, `turns` where its pairs begin in `pairs`
    [turns, 5]: the addresses of A and B, the rank, the group, and which of its group's pairs it is.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor, float]], rows: Sequence[Sequence[int]]) -> None:
        self.kept, (self.like, _, _) = pairs, pairs[0]
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, numbers in enumerate(rows):
            groups.setdefault(tuple(numbers), []).append(row)
        self.rows, self.groups, self.most = len(rows), len(groups), max(map(len, groups.values()))
        self.depth, self.rank = max(map(len, groups)), max(len(A) for A, _, _ in pairs)
        self.sizes = (self.rows, self.groups, self.depth, self.rank)
        turns = [(group, level, pairs[n]) for group, each in enumerate(groups) for level, n in enumerate(each)]
        entries = [[A.data_ptr(), B.data_ptr(), len(A), group, level] for group, level, (A, B, _) in turns]
        self.aligned = math.gcd(16, *(address for entry in entries for address in entry[:2]))
        device, order = self.like.device, [row for each in groups.values() for row in each]
        ends = _ends(groups.values()), _ends(groups)
        self.pairs, self.order = torch.tensor(entries, device=device), torch.tensor(order, device=device)
        self.starts, self.turns = (torch.tensor(each, device=device) for each in ends)
        self.scales = torch.tensor([scale for _, _, (_, _, scale) in turns], dtype=torch.float32, device=device)

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        """y + scale·B(A(x)) by each row's pairs: x [rows, ..., in], y [rows, ..., out]."""
        x, y = x.contiguous(), y.contiguous()
        width, out = x.shape[-1], y.shape[-1]
        tokens = math.prod(x.shape[1:-1])
        to, h = torch.empty_like(y), x.new_empty(self.rows * tokens, self.depth, self.rank, dtype=torch.float32)
        sides = tile(tokens * self.most, self.rank, y.dtype)
        tiles, sizes = triton.cdiv(tokens * self.most, sides["rows"]), (self.depth, self.rank)
        common = {**sides, "aligned": self.aligned, **FUSED}
        shrink[tiles, len(self.pairs), triton.cdiv(self.rank, sides["ranks"])](
            x, h, self.like, self.pairs, self.order, self.starts, tokens, width, *sizes, **common
        )
        expand[tiles, self.groups, triton.cdiv(out, sides["columns"])](
            h, y, to, self.like, self.pairs, self.scales, self.order, self.starts, self.turns, tokens, out, *sizes,
            **common,
        )  # fmt: skip
        return to


def _ends(parts: Iterable[Collection[int]]) -> list[int]:
    """Where each part begins in all of them together, and where the last ends."""
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part))
    return ends
