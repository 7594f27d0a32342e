"""Thin products beside a layer, with backwards of their own that keep as little as there is to keep.

Left to itself, autograd keeps for each layer the input x in the dtype of the products, a mask and what dropout left of
x, and copies of A and B cast down. Here a product keeps x as it came, which the layers that read it, and whoever else
keeps it, share; A and B are the parameters; dropout's mask is computed again from its seed. Products have the dtype of
the layer's answer y and sum in float32; `up` adds y within that sum. None is wider than a layer: (G·B)·A for the
gradient of x, (G·B)ᵀ·x for that of A.

Each is an ordinary differentiable function, and so is its backward. Functions are written with `ctx` in forward: with
`setup_context` torch looks up a signature at each call, which takes several times as long as the products of one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from veneer.ops import lora_cpu
from veneer.ops.dropout import NONE, Dropout
from veneer.ops.kernels import measured

Gradients = tuple[Tensor | None, ...]
FEW = 16
"""Tokens up to which a kernel on a GPU may read A again for each."""


def beside(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float, dropout: Dropout = NONE) -> Tensor:
    """y + scale·B(A(dropout(x))): x [*, in], y [*, out], A [rank, in], B [out, rank]."""
    if dropout.seed is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        found = lora_cpu.beside(x, y, A, B, scale)
        if found is not None:
            return found
        if not x.is_cpu and x.numel() <= FEW * x.shape[-1]:
            return _few(x, y, A, B, scale)
    return up(down(x, A, y.dtype, dropout), y, B, scale * dropout.scale)


@measured("lora_triton.few")
def _few(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return up(down(x, A, y.dtype), y, B, scale)


def down(x: Tensor, A: Tensor, dtype: torch.dtype, dropout: Dropout = NONE) -> Tensor:
    """A(dropout(x)) in a dtype, [*, rank], not yet scaled. Keeps x as it came, and nothing where A is frozen."""
    return _run(_Down, _down, x, A, dtype, dropout.seed, dropout.threshold)


def up(h: Tensor, y: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale·h·Bᵀ, rounded once. Keeps h."""
    return _run(_Up, _up, h, y, B, scale)


def turned(h: Tensor, y: Tensor, B: Tensor, g: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """bias + g·(y - bias + scale·h·Bᵀ) with one g for each output; y bit for bit where g is one and B zero.

    Keeps h and the answer, which what follows often keeps too, in place of y: the gradient of g needs the sum in
    brackets, which is (answer - bias) / g. An output whose g is zero gives it none.
    """
    return _run(_Turned, _turned, h, y, B, g, bias, scale)


def scaled(h: Tensor, y: Tensor, d: Tensor, B: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale·b·((d·h)·Bᵀ) with vectors d [rank] and b [out]. Keeps h."""
    return _run(_Scaled, _scaled, h, y, d, B, b, scale)


def _run(function: type[Function], plain: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function` where gradients are wanted of it, else `plain`, which it computes; torch.func differentiates that."""
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled() and (compiling or not lora_cpu.transforms()):
        found: Tensor = function.apply(*inputs)
        return found
    return plain(*inputs)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # not -1: a rank may be 0


def _exact(y: Tensor) -> AbstractContextManager[Any]:
    """Autocast off where it is on: these products choose their dtype themselves."""
    kind = y.device.type
    on = not y.is_meta and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


@measured("lora_triton.down")
def _down(x: Tensor, A: Tensor, dtype: torch.dtype, seed: Tensor | None, threshold: int) -> Tensor:
    with _exact(x):
        return Dropout(seed, threshold)(x).to(dtype) @ A.to(dtype).T


@measured("lora_triton.into")
def _into(dh: Tensor, A: Tensor, dtype: torch.dtype, seed: Tensor | None, threshold: int) -> Tensor:
    """The gradient of x."""
    return Dropout(seed, threshold)((dh @ A.to(dh.dtype)).to(dtype))


@measured("lora_triton.across")
def _across(dh: Tensor, x: Tensor, dtype: torch.dtype, seed: Tensor | None, threshold: int) -> Tensor:
    """The gradient of A."""
    return (_rows(dh).T @ _rows(Dropout(seed, threshold)(x).to(dh.dtype))).to(dtype)


class _Down(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _down(*inputs)
        x, A, _, seed, ctx.threshold = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, A, seed)
        return output

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Gradients:
        x, A, seed = ctx.saved_tensors
        dx = dA = None
        if ctx.needs_input_grad[0]:
            dx = _into(dh, A, ctx.dtype, seed, ctx.threshold)
        if ctx.needs_input_grad[1]:
            dA = _across(dh, x, A.dtype, seed, ctx.threshold)
        return dx, dA, None, None, None


@measured("lora_triton.up")
def _up(h: Tensor, y: Tensor, B: Tensor, scale: float) -> Tensor:
    with _exact(y):
        flat = torch.addmm(_rows(y), _rows(h), B.to(y.dtype).T, alpha=scale)
        # no view, which a model could not change in place, as some do with a query
        return cast(Tensor, torch.ops.aten._unsafe_view(flat, y.shape))


class _Up(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _up(*inputs)
        h, _, B, ctx.scale = inputs
        ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, B)
        return output

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Gradients:
        h, B = ctx.saved_tensors
        dh = dB = None
        if ctx.needs_input_grad[0]:
            dh = G @ B.to(G.dtype) * ctx.scale
        if ctx.needs_input_grad[2]:
            dB = _outer(G, h * ctx.scale, B)
        return dh, G, dB, None


def _outer(G: Tensor, h: Tensor, B: Tensor) -> Tensor:
    """Gᵀ·h as B is laid out, made as hᵀ·G, which is faster where G is wide."""
    return (_rows(h).T @ _rows(G)).T.to(B.dtype, memory_format=torch.contiguous_format)


def _turned(h: Tensor, y: Tensor, B: Tensor, g: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    plain = y if bias is None else y - bias.to(y.dtype)
    return _up(h, torch.addcmul(y, (g - 1).to(y.dtype), plain), g.unsqueeze(1) * B, scale)


class _Turned(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _turned(*inputs)
        h, _, B, g, bias, ctx.scale = inputs
        needs = ctx.needs_input_grad
        ctx.save_for_backward(h if needs[2] else None, output if needs[3] else None, B, g, bias)
        return output

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Gradients:
        h, out, B, g, bias = ctx.saved_tensors
        dtype, more = G.dtype, g - 1
        dh = dy = dB = dg = db = None
        if ctx.needs_input_grad[0]:
            dh = G @ (ctx.scale * g.unsqueeze(1) * B).to(dtype)
        if ctx.needs_input_grad[1]:
            dy = torch.addcmul(G, more.to(dtype), G)
        if ctx.needs_input_grad[2]:
            dB = g.unsqueeze(1) * _outer(G, h * ctx.scale, B)
        if ctx.needs_input_grad[3]:
            sums = _sum(G * (out if bias is None else out - bias.to(dtype)), g)
            dg = torch.where(g == 0, torch.zeros_like(g), sums / g)
        if bias is not None and ctx.needs_input_grad[4]:
            db = -more.to(bias.dtype) * _sum(G, bias)
        return dh, dy, dB, dg, db, None


def _scaled(h: Tensor, y: Tensor, d: Tensor, B: Tensor, b: Tensor, scale: float) -> Tensor:
    return _up(h * d.to(h.dtype), y, b.unsqueeze(1) * B, scale)


class _Scaled(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _scaled(*inputs)
        h, _, d, B, b, ctx.scale = inputs
        ctx.save_for_backward(h, d, B, b)
        return output

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Gradients:
        h, d, B, b = ctx.saved_tensors
        dtype = G.dtype
        narrow = d.to(dtype)
        dz = G @ (ctx.scale * b.unsqueeze(1) * B).to(dtype)
        outer = _outer(G, h * narrow * ctx.scale, b)
        dB = b.unsqueeze(1) * outer if ctx.needs_input_grad[3] else None
        return dz * narrow, G, _sum(dz * h, d), dB, (outer * B).sum(1), None


def _sum(G: Tensor, like: Tensor) -> Tensor:
    """Over all but the last dimension, in a vector's dtype."""
    return _rows(G).sum(0, dtype=like.dtype)
