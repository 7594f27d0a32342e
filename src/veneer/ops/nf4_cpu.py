"""NF4 on a CPU in C: nf4_cpu.c, which is built with the package where there is a compiler for it.

The library has a plain C interface and knows nothing of Python, so one file serves every version; ctypes lets go of the
interpreter's lock while it works, on as many threads as torch has.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from veneer.ops import extensions, nf4
from veneer.ops.nf4 import Packed

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""By their number in the C file."""
VECTORS = ("plain C", "AVX2", "AVX-512")
"""By their number in the C file."""


class _Task(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "absmax", "inner", "outer", "offset", "table", "dense")),
        *((name, ctypes.c_int64) for name in ("count", "block", "start", "across", "stride")),
        ("dtype", ctypes.c_int32),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = extensions.library("_nf4_cpu")
    if library is None:
        return None
    library.veneer_nf4_dequantize.restype = library.veneer_nf4_quantize.restype = None
    return library


def missing(device_type: str) -> str | None:
    """Why this cannot run on such a device; None where it can."""
    if device_type != "cpu":
        return "it is for a CPU"
    return None if _library() else extensions.NOT_BUILT


def vectors() -> int:
    """The widest vectors that this machine has, a number of VECTORS."""
    return int(_built().veneer_nf4_vectors())


def dequantize(packed: Packed, dtype: torch.dtype, width: int | None = None) -> Tensor:
    """The dense weight; `width` is a number of VECTORS, for tests."""
    dense = torch.empty(packed.shape, dtype=dtype)
    blocks = -(-dense.numel() // packed.block_size)
    _fill(dense, packed, 0, max(1, blocks), 0, width)
    return dense


def tile(packed: Packed, rows: range, columns: range, dense: Tensor, width: int | None = None) -> Tensor:
    """Some rows and columns of a matrix, in the memory of `dense`; its rows, and these columns, are whole blocks."""
    dense = dense[: len(rows) * len(columns)].view(len(rows), len(columns))
    stride, across = packed.shape[1] // packed.block_size, len(columns) // packed.block_size
    _fill(dense, packed, rows.start * stride + columns.start // packed.block_size, across, stride, width)
    return dense


def _fill(dense: Tensor, packed: Packed, start: int, across: int, stride: int, width: int | None) -> None:
    if packed.outer is None or packed.offset is None:
        statistics: tuple[Tensor | None, ...] = packed.absmax.float(), None, None, None
    else:
        statistics = packed.absmax, nf4.dynamic_levels(), packed.outer.float(), packed.offset.float()
    tensors = (packed.data, *statistics, nf4.levels())
    kept = [None if tensor is None else tensor.contiguous() for tensor in tensors]  # for as long as the call takes
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in kept]
    sizes = (dense.numel(), packed.block_size, start, across, stride)
    task = _Task(*pointers, dense.data_ptr(), *sizes, DTYPES[dense.dtype])
    _built().veneer_nf4_dequantize(*_arguments(task, width))


def quantize(weight: Tensor, block_size: int, double_quant: bool, width: int | None = None) -> Packed:
    """Pack a finite weight, as `nf4.quantize` does."""
    dense = weight.detach().contiguous()
    dense = dense if dense.dtype in DTYPES else dense.float()
    blocks = -(-dense.numel() // block_size)
    data, absmax = torch.empty((dense.numel() + 1) // 2, 1, dtype=torch.uint8), torch.empty(blocks)
    middles = nf4.middles(nf4.levels())
    pointers = (data.data_ptr(), absmax.data_ptr(), None, None, None, middles.data_ptr(), dense.data_ptr())
    task = _Task(*pointers, dense.numel(), block_size, 0, max(1, blocks), 0, DTYPES[dense.dtype])
    _built().veneer_nf4_quantize(*_arguments(task, width))
    packed = Packed(data, absmax, tuple(weight.shape), block_size)
    return nf4.quantize_magnitudes(packed) if double_quant else packed


def _built() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "missing() says so"
    return library


def _arguments(task: _Task, width: int | None) -> tuple[object, ...]:
    chosen = vectors() if width is None else width
    return ctypes.byref(task), ctypes.c_int32(chosen), ctypes.c_int64(torch.get_num_threads())
