"""Quantized linears in a probe forward: their own kernels cannot run without numbers, so stand-ins multiply instead."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from veneer import formats


def tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the parameters and buffers of a model as meta tensors, packed weights in the shape they stand for; those alone).

    A packed weight is called `weight` whatever its module calls it.
    """
    packed: dict[str, Tensor] = {
        f"{path}.weight": nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        for path, _, shape in _modules(model)
    }
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: packed.get(name, _meta(tensor)) for name, tensor in found.items()}, packed


def _meta(tensor: Tensor) -> Tensor:
    """A stand-in with the same shape; one dtype for all, so that no cast comes between."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty_like(tensor, device="meta", dtype=dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _modules(model: nn.Module) -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """The quantized modules: path, module and the shape that its weight has for it."""
    found = []
    for path, module in model.named_modules():
        form = formats.of(module)
        weight = form.tensor(module, "weight") if form else None
        if form is not None and weight is not None:
            shape = form.shape(module, "weight")
            if weight.numel() != math.prod(shape) or not weight.is_floating_point():
                found.append((path, module, shape))
            elif form.quantized:
                found.append((path, module, tuple(weight.shape)))
    return found


@contextmanager
def unpacked(model: nn.Module, packed: dict[str, Tensor]) -> Iterator[None]:
    """Within, quantized linears multiply by the stand-ins for their weights."""
    linears = [(path, module) for path, module, _ in _modules(model) if not isinstance(module, nn.Embedding)]
    own = [vars(module).get("forward") for _, module in linears]
    for path, module in linears:
        vars(module)["forward"] = functools.partial(nn.functional.linear, weight=packed[f"{path}.weight"])
    try:
        yield
    finally:
        for (_, module), forward in zip(linears, own, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward
