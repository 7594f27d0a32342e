"""The ways to make an NF4 weight dense, fastest first, and the product that never keeps one.

| kernel         | where                                                       |
|----------------|-------------------------------------------------------------|
| `c`            | a CPU, where the package was built with a C compiler        |
| `bitsandbytes` | its own operators where it is installed, through `formats/` |
| `triton`       | CUDA, where Triton is installed                             |
| `table`        | plain torch: one lookup for two values                      |
| `reference`    | plain torch: the specification, in every dtype              |

All give the numbers of the reference. The first that a device has is taken for it: `chosen` says which. One that is
asked for by name runs or raises, and so does the chosen one: a kernel that is there and fails is an error, not a reason
to take the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.errors import PlaceError
from veneer.ops import grouped, nf4, nf4_cpu
from veneer.ops.kernels import FAST, no_triton
from veneer.ops.nf4 import Packed

PIECE = 1 << 21
"""How many values a thread makes dense at a time for a product: few enough to stay in a cache until they are used."""


@dataclass(frozen=True)
class Kernel:
    """A way to make a weight dense."""

    dequantize: Callable[[Packed, torch.dtype], Tensor]
    missing: Callable[[str], str | None] = lambda device_type: None
    """Why it cannot run on a kind of device; None where it can."""
    tile: Callable[[Packed, range, range, Tensor], Tensor] | None = None
    """Some rows and columns, whole blocks all of them, in given memory; None where it makes whole weights only."""


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


def _triton(packed: Packed, dtype: torch.dtype) -> Tensor:
    from veneer.ops import nf4_triton

    return nf4_triton.dequantize(packed, dtype)


KERNELS = {
    "c": Kernel(nf4_cpu.dequantize, nf4_cpu.missing, nf4_cpu.tile),
    "triton": Kernel(_triton, no_triton),
    "table": Kernel(_table),
    "reference": Kernel(nf4.dequantize),
}
"""By name, the fastest first; `formats/nf4.py` puts bitsandbytes' behind `c`."""


@functools.cache
def chosen(device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The name of the fastest kernel for this kind of device and dtype."""
    if dtype not in FAST or device_type == "meta":
        return "reference"
    return next(name for name, kernel in KERNELS.items() if kernel.missing(device_type) is None)


def named(name: str) -> Kernel:
    """The kernel of that name; raises PlaceError where there is none."""
    if name not in KERNELS:
        raise PlaceError(
            f"There is no NF4 kernel {name!r}. Choose one of {', '.join(KERNELS)}, or None for the fastest."
        )
    return KERNELS[name]


def check(name: str, device_type: str, dtype: torch.dtype = torch.float32) -> Kernel:
    """The kernel of that name; raises PlaceError where it cannot run."""
    kernel = named(name)
    reason = kernel.missing(device_type)
    if reason is None and dtype not in FAST and name != "reference":
        reason = f"it does not make {dtype}, which the reference does"
    if reason is not None:
        raise PlaceError(
            f"The NF4 kernel {name!r}, which was asked for by name, cannot run on {device_type}: {reason}."
        )
    return kernel


def _kernel(name: str | None, packed: Packed, dtype: torch.dtype) -> Kernel:
    device_type = packed.data.device.type
    return check(name or chosen(device_type, dtype), device_type, dtype)


def quantize(weight: Tensor, block_size: int, double_quant: bool) -> Packed:
    """Pack a finite weight, in C where that was built."""
    make = nf4.quantize if nf4_cpu.missing(weight.device.type) else nf4_cpu.quantize
    return make(weight, block_size, double_quant)


def dequantize(packed: Packed, dtype: torch.dtype, kernel: str | None = None) -> Tensor:
    """The dense weight in `dtype`, by the chosen kernel or by the one that `kernel` names."""
    dense: Tensor = _dequantize(*_parts(packed), dtype, kernel)
    return dense


def multiply(x: Tensor, packed: Packed, kernel: str | None = None) -> Tensor:
    """x·Wᵀ, with gradients for x: W is made once forward and once backward, and nothing dense of it is kept."""
    product: Tensor = _product(_cast(x), *_parts(packed), kernel, False)
    return product


def multiply_grouped(
    x: Tensor, packed: Packed, ends: Tensor, transposed: bool = False, kernel: str | None = None
) -> Tensor:
    """x[i]·W[e]ᵀ for each row i of group e, with gradients for x, or x[i]·W[e] for a stack that is stored `transposed`.

    Groups are those of `grouped`. Each matrix that is met is made dense alone, once forward and once backward, and
    nothing dense of it is kept; all at once only where a block has weights of two.
    """
    product: Tensor = _grouped(_cast(x), *_parts(packed), ends, kernel, transposed)
    return product


def _cast(x: Tensor) -> Tensor:
    """What autocast makes of activations: here, since W is made in the dtype that it is used in."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype in FAST:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


# torch's operators, for torch.compile, which cannot look into a kernel and keeps one as a node of its graph

_Parts = tuple[Tensor, Tensor, tuple[int, ...], int, Tensor | None, Tensor | None]


def _parts(packed: Packed) -> _Parts:
    return packed.data, packed.absmax, packed.shape, packed.block_size, packed.outer, packed.offset


@torch.library.custom_op("veneer::nf4_dequantize", mutates_args=())
def _dequantize(
    data: Tensor,
    absmax: Tensor,
    shape: list[int],
    block_size: int,
    outer: Tensor | None,
    offset: Tensor | None,
    dtype: torch.dtype,
    kernel: str | None,
) -> Tensor:
    packed = Packed(data, absmax, tuple(shape), block_size, outer, offset)
    return _kernel(kernel, packed, dtype).dequantize(packed, dtype)


@_dequantize.register_fake
def _(data: Tensor, absmax: Tensor, shape: list[int], *rest: Any) -> Tensor:
    return data.new_empty(shape, dtype=rest[-2])


@torch.library.custom_op("veneer::nf4_product", mutates_args=())
def _product(
    x: Tensor,
    data: Tensor,
    absmax: Tensor,
    shape: list[int],
    block_size: int,
    outer: Tensor | None,
    offset: Tensor | None,
    kernel: str | None,
    transposed: bool,
) -> Tensor:
    packed = Packed(data, absmax, tuple(shape), block_size, outer, offset)
    pieces = _pieces(packed, x.dtype, _kernel(kernel, packed, x.dtype), transposed)
    products = [x @ piece if transposed else F.linear(x, piece) for piece in pieces]
    return products[0] if len(products) == 1 else torch.cat(products, -1)


@_product.register_fake
def _(x: Tensor, data: Tensor, absmax: Tensor, shape: list[int], *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[rest[-1]])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.packed = inputs[1:-1]  # not saved_tensors: they are the layer's and do not change
    ctx.transposed = not inputs[-1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _product(gradient, *ctx.packed, ctx.transposed), *[None] * (len(ctx.packed) + 1)


_product.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("veneer::nf4_grouped", mutates_args=())
def _grouped(
    x: Tensor,
    data: Tensor,
    absmax: Tensor,
    shape: list[int],
    block_size: int,
    outer: Tensor | None,
    offset: Tensor | None,
    ends: Tensor,
    kernel: str | None,
    transposed: bool,
) -> Tensor:
    packed = Packed(data, absmax, tuple(shape), block_size, outer, offset)
    chosen = _kernel(kernel, packed, x.dtype)
    whole = None if nf4.apart(packed) else chosen.dequantize(packed, x.dtype)
    y = x.new_empty(len(x), shape[2 if transposed else 1])
    for number, rows in grouped.groups(ends):
        pieces = _pieces(packed, x.dtype, chosen, transposed, number) if whole is None else iter([whole[number]])
        start = 0
        for piece in pieces:
            product = x[rows] @ piece if transposed else F.linear(x[rows], piece)
            y[rows, start : start + product.shape[1]] = product
            start += product.shape[1]
    return y


@_grouped.register_fake
def _(x: Tensor, data: Tensor, absmax: Tensor, shape: list[int], *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], shape[2 if rest[-1] else 1])


def _keep_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.packed, ctx.kernel, ctx.transposed = inputs[1:7], inputs[8], not inputs[9]
    ctx.save_for_backward(inputs[7])


def _backward_grouped(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (ends,) = ctx.saved_tensors
    return _grouped(gradient, *ctx.packed, ends, ctx.kernel, ctx.transposed), *[None] * 9


_grouped.register_autograd(_backward_grouped, setup_context=_keep_grouped)


def _pieces(packed: Packed, dtype: torch.dtype, kernel: Kernel, columns: bool, number: int = 0) -> Iterator[Tensor]:
    """W, a few of its rows or columns after the other, each a whole row's or column's answer of the product.

    Of a stack it is the matrix of that `number`.
    """
    height, width = packed.shape[-2:]
    if kernel.tile is None or width % packed.block_size:
        yield kernel.dequantize(nf4.matrix(packed, number), dtype)
        return
    above = number * height
    packed = replace(packed, shape=(torch.Size(packed.shape[:-1]).numel(), width))
    unit, other = (packed.block_size, height) if columns else (1, width)
    count = width if columns else height
    size = min(count, max(1, PIECE * torch.get_num_threads() // (unit * other)) * unit)
    memory = packed.data.new_empty(size * other, dtype=dtype)  # the same for all: new pages take longer than the work
    for start in range(0, count, size):
        if columns:
            rows, part = range(above, above + height), range(start, min(start + size, width))
        else:
            rows, part = range(above + start, above + min(start + size, height)), range(width)
        yield kernel.tile(packed, rows, part, memory)
