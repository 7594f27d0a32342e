"""Products of a stack of matrices with rows that are sorted into groups: each group meets the matrix of its number.

Experts of a mixture work so on tokens that are sorted by expert. `ends` [matrices] says after which row each group
ends; a group may be empty, and its matrix is then not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def multiply(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """x[i]·stack[e]ᵀ for each row i of group e: x [rows, in], stack [matrices, out, in]; gradients flow to both."""
    product: Tensor = _product(x, stack, ends)
    return product


def groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(number, rows) of each group that has any."""
    start = 0
    for number, end in enumerate(ends.tolist()):
        if end > start:
            yield number, slice(start, end)
        start = end


# torch's operators, for torch.compile, which cannot follow a loop whose lengths the numbers tell


@torch.library.custom_op("veneer::grouped_product", mutates_args=())
def _product(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    y = x.new_empty(len(x), stack.shape[1])
    for number, rows in groups(ends):
        torch.mm(x[rows], stack[number].T, out=y[rows])
    return y


@_product.register_fake
def _(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], stack.shape[1])


@torch.library.custom_op("veneer::grouped_outer", mutates_args=())
def _outer(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    stack = x.new_zeros(len(ends), gradient.shape[1], x.shape[1])
    for number, rows in groups(ends):
        torch.mm(gradient[rows].T, x[rows], out=stack[number])
    return stack


@_outer.register_fake
def _(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], gradient.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, stack, ends = ctx.saved_tensors
    to_x = _product(gradient, stack.mT, ends) if ctx.needs_input_grad[0] else None
    to_stack = _outer(gradient, x, ends) if ctx.needs_input_grad[1] else None
    return to_x, to_stack, None


_product.register_autograd(_backward, setup_context=_keep)
