"""Quantized modules in a probe forward: their own kernels cannot run without numbers, so stand-ins multiply instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from veneer import formats


def tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the parameters and buffers of a model as meta tensors, packed weights in the shape they stand for; those alone).

    A linear's packed weight is called `weight` whatever its module calls it.
    """
    packed: dict[str, Tensor] = {
        f"{path}.{name}": nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        for path, _, shapes in _modules(model)
        for name, shape in shapes.items()
    }
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: packed.get(name, _meta(tensor)) for name, tensor in found.items()}, packed


def _meta(tensor: Tensor) -> Tensor:
    """A stand-in with the same shape; one dtype for all, so that no cast comes between."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty_like(tensor, device="meta", dtype=dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _modules(model: nn.Module) -> list[tuple[str, nn.Module, dict[str, tuple[int, ...]]]]:
    """The quantized modules: path, module and the shapes that its weights have for it, by name."""
    found = []
    for path, module in model.named_modules():
        form = formats.of(module)
        shapes = {} if form is None else dict(_shapes(module, form))
        if shapes:
            found.append((path, module, shapes))
    return found


def _shapes(module: nn.Module, form: formats.Format) -> Iterator[tuple[str, tuple[int, ...]]]:
    for below, name in form.weights(module):
        weight = None if below else form.tensor(module, name)
        if weight is None or not (form.readable or name == "weight"):
            continue
        shape = form.shape(module, name)
        if weight.numel() != math.prod(shape) or not weight.is_floating_point():
            yield name, tuple(form.stored(module, torch.empty(shape, device="meta")).shape)
        elif form.quantized:
            yield name, tuple(weight.shape)


@contextmanager
def unpacked(model: nn.Module, packed: dict[str, Tensor]) -> Iterator[None]:
    """Within, quantized modules multiply by the stand-ins for their weights."""
    found = [one for one in _modules(model) if not isinstance(one[1], nn.Embedding)]
    own = [vars(module).get("forward") for _, module, _ in found]
    for path, module, shapes in found:
        form = formats.of(module)
        assert form is not None
        vars(module)["forward"] = form.stand_in(module, {name: packed[f"{path}.{name}"] for name in shapes})
    try:
        yield
    finally:
        for (_, module, _), forward in zip(found, own, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward
