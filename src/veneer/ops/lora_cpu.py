"""LoRA's small work on a CPU in C: lora_cpu.c, which is built with the package where there is a compiler for it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ops import extensions

FEW = 8
"""Tokens up to which calling torch's products takes longer than what they compute."""
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes of activations by their number in the C file."""
_KINDS = Tensor, Tensor, nn.Parameter, nn.Parameter
"""What `beside` can read by its memory."""
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = extensions.library("_lora_cpu")
    if library is None:
        return None
    library.veneer_drop.restype = None
    library.veneer_drop.argtypes = (
        *(_POINTER, _POINTER, _INTEGER),
        *(ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int32, _INTEGER),
    )
    return library


@functools.cache
def _beside() -> Any:
    """The function for few tokens, by a way that keeps the interpreter's lock: to let go of it takes longer."""
    library = _library()
    if library is None:
        return None
    function = ctypes.PyDLL(library._name).veneer_beside
    function.argtypes = [_POINTER] * 6
    return function


class _Sizes(ctypes.Structure):
    """Those of a call, which are the same for many: to hand them over one by one takes longer than the products."""

    _fields_ = [
        *((name, _INTEGER) for name in ("tokens", "in", "out", "rank")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    ]


@functools.lru_cache(maxsize=4096)
def _sizes(*values: float) -> tuple[_Sizes, int]:
    """A call's sizes, and where they lie."""
    sizes = _Sizes(*values)
    return sizes, ctypes.addressof(sizes)


def missing() -> str | None:
    """Why there is none of this; None where there is."""
    return None if _library() else extensions.NOT_BUILT


def fits(x: Tensor) -> bool:
    """Whether `drop` can read this tensor: a plain one on a CPU, of any dtype of 2, 4 or 8 bytes."""
    plain = (type(x) is Tensor or type(x) is nn.Parameter) and x.is_cpu and not transforms()
    return plain and x.itemsize > 1 and not x.is_complex() and _library() is not None


def drop(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """As `dropout.reference`."""
    x = x.contiguous()
    to = torch.empty_like(x)
    sizes = x.numel(), int(seed), threshold, x.itemsize, torch.get_num_threads()
    _built().veneer_drop(x.data_ptr(), to.data_ptr(), *sizes)
    return to


def beside(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor | None:
    """y + scale·B(A(x)) for a few tokens, summed in float32 and rounded once; None where this is not for them."""
    count, width = x.numel(), x.shape[-1]
    if (type(x), type(y), type(A), type(B)) != _KINDS or not 0 < count <= FEW * width:
        return None
    dtype = y.dtype
    if x.dtype is not dtype or dtype not in _NUMBERS or not (A.dtype is B.dtype is torch.float32):
        return None
    if not (x.is_cpu and y.is_cpu and A.is_cpu and B.is_cpu):
        return None
    if not (x.is_contiguous() and y.is_contiguous() and A.is_contiguous() and B.is_contiguous()):
        return None
    function = _beside()
    if function is None or transforms():
        return None
    to = torch.empty_like(y)
    sizes = _sizes(count // width, width, y.shape[-1], A.shape[0], scale, _NUMBERS[dtype])
    done = function(x.data_ptr(), y.data_ptr(), A.data_ptr(), B.data_ptr(), to.data_ptr(), sizes[1])
    return to if done else None


transforms: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Within torch.func's transforms tensors have no memory to point to."""


def _built() -> Any:
    library = _library()
    assert library is not None, "fits() says so"
    return library
