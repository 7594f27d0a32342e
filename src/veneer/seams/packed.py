"""Quantized linears in a probe forward: their own kernels cannot run without numbers, so stand-ins multiply instead."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer import formats


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model as meta tensors; a packed weight in the shape it stands for."""
    packed = {
        f"{path}.weight": nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        for path, _, shape in _modules(model)
    }
    found = {**dict(model.named_parameters()), **dict(model.named_buffers()), **packed}
    return {name: _meta(tensor) for name, tensor in found.items()}


def _meta(tensor: Tensor) -> Tensor:
    """A stand-in with the same shape; one dtype for all, so that no cast comes between."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty_like(tensor, device="meta", dtype=dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _modules(model: nn.Module) -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """The quantized linears: path, module and logical shape of its weight."""
    found = []
    for path, module in model.named_modules():
        form, weight = formats.of(module), module._parameters.get("weight")
        if form is not None and weight is not None:
            shape = form.shape(module, "weight")
            if not weight.is_floating_point() or weight.numel() != math.prod(shape):
                found.append((path, module, shape))
    return found


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Within, quantized linears multiply by a plain weight."""
    linears = [module for _, module, _ in _modules(model)]
    for module in linears:
        module.__dict__["forward"] = functools.partial(_multiply, module)
    try:
        yield
    finally:
        for module in linears:
            del module.__dict__["forward"]


def _multiply(module: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.weight)
