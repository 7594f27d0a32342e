"""Tensors that several processes hold a part of each (FSDP2's DTensors), as wholes and back.

Every process has to call these functions, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is shared out."""
    if not shared_out(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, shared out as `other` is."""
    if not shared_out(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    shared: Any = other
    found: Tensor = distribute_tensor(tensor.to(shared.device), shared.device_mesh, shared.placements)
    return found


def gather(modules: Iterable[nn.Module]) -> None:
    """Give modules whole parameters again, for good; one that several of them hold stays one."""
    found: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and shared_out(parameter):
                if parameter not in found:
                    found[parameter] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = found[parameter]


def shared_out(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without importing what makes them where nothing else has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
