"""NF4 on CUDA in Triton: every byte is read once and every value written once.

This kernel has not run on a GPU. What tests hold is that it compiles for compute capabilities 8.0 and 9.0, stores 16
bytes at a time, and gives the reference's numbers in Triton's interpreter, which runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops import nf4
from veneer.ops.nf4 import Packed

TILE = 1024
"""Bytes a program reads."""


@triton.jit  # type: ignore[untyped-decorator]
def kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations, and knows its own only
    codes,  # noqa: ANN001
    absmax,  # noqa: ANN001
    inner,  # noqa: ANN001
    outer,  # noqa: ANN001
    offset,  # noqa: ANN001
    levels,  # noqa: ANN001
    dense,  # noqa: ANN001
    count,  # noqa: ANN001
    block: tl.constexpr,
    group: tl.constexpr,
    double: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Make dense the values of `tile` bytes. Pointers as in `Packed`, tables as in nf4.py; bfloat16 as its bits."""
    start = tl.program_id(0).to(tl.int64) * tile
    at = start + tl.arange(0, tile)
    there = at * 2 < count
    byte = tl.load(codes + at, mask=there, other=0).to(tl.int32)
    of = at * 2 // block
    scale = tl.load(absmax + of, mask=there, other=0)
    if double:
        second = tl.load(outer + of // group, mask=there, other=0.0)
        scale = tl.load(inner + scale.to(tl.int32)) * second + tl.load(offset)
    values = tl.interleave(tl.load(levels + (byte >> 4)) * scale, tl.load(levels + (byte & 15)) * scale)
    if dense.dtype.element_ty == tl.int16:  # rounded here, since the interpreter cuts bits off
        bits = values.to(tl.int32, bitcast=True)
        values = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    to = start * 2 + tl.arange(0, 2 * tile)
    tl.store(dense + to, values.to(dense.dtype.element_ty), mask=to < count)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The dense weight."""
    device = packed.data.device
    dense = torch.empty(packed.shape, dtype=dtype, device=device)
    levels, double = nf4.levels(device), packed.outer is not None
    tables = (nf4.dynamic_levels(device), packed.outer, packed.offset) if double else (levels, levels, levels)
    with torch.cuda.device_of(packed.data):
        kernel[(triton.cdiv(len(packed.data), TILE),)](
            packed.data,
            packed.absmax,
            *tables,
            levels,
            dense.view(torch.int16) if dtype == torch.bfloat16 else dense,
            dense.numel(),
            block=packed.block_size,
            group=nf4.OUTER,
            double=double,
            tile=TILE,
            enable_fp_fusion=False,  # rounded after the multiplication and after the addition, as the reference is
        )
    return dense
