"""The ways to make an NF4 weight dense, fastest first, and the product that never keeps one.

| kernel         | where                                     |
|----------------|-------------------------------------------|
| `bitsandbytes` | its own operators, through `formats/`     |
| `table`        | plain torch: one lookup for two values    |
| `reference`    | plain torch: the specification            |

All give the same numbers as the reference, bit for bit in float32. The first that runs on a device is chosen for it
once; `chosen` says which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops import nf4
from veneer.ops.nf4 import Packed

Kernel = Callable[[Packed, torch.dtype], Tensor]


def _table(packed: Packed, dtype: torch.dtype) -> Tensor:
    size = torch.Size(packed.shape).numel()
    values = F.embedding(packed.data.flatten().int(), _pairs(packed.data.device)).flatten()
    values = F.pad(values, (0, -len(values) % packed.block_size)).view(-1, packed.block_size)
    return (values * nf4.magnitudes(packed).unsqueeze(1)).flatten()[:size].to(dtype).view(packed.shape)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """[256, 2]: the two levels that each byte means."""
    byte = torch.arange(256, device=device)
    return nf4.levels(device)[torch.stack([byte >> 4, byte & 15], 1)]


KERNELS: dict[str, Kernel] = {"table": _table, "reference": nf4.dequantize}
"""By name, the fastest first; `formats/nf4.py` puts bitsandbytes' in front."""


@functools.cache
def chosen(device_type: str) -> str:
    """The name of the fastest kernel that runs on this kind of device."""
    probe = nf4.quantize(torch.ones(2, 64, device=device_type))
    for name, kernel in KERNELS.items():
        try:
            kernel(probe, torch.float32)
        except (ImportError, NotImplementedError, RuntimeError):
            continue
        return name
    raise AssertionError("the reference runs everywhere")


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The dense weight in `dtype`, by the chosen kernel; float64 and integer dtypes by the reference."""
    fast = dtype in (torch.float32, torch.float16, torch.bfloat16)
    name = chosen(packed.data.device.type) if fast and not packed.data.is_meta else "reference"
    return KERNELS[name](packed, dtype)


class _Multiply(torch.autograd.Function):
    """x·Wᵀ with W dense only while it is multiplied by: made once forward and once backward, never saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return F.linear(x, dequantize(packed, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ dequantize(ctx.packed, gradient.dtype), None


def multiply(x: Tensor, packed: Packed) -> Tensor:
    """x·Wᵀ, with gradients for x and no dense weight kept."""
    product: Tensor = _Multiply.apply(x, packed)  # type: ignore[no-untyped-call]
    return product
