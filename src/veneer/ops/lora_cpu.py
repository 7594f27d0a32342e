"""LoRA's small work on a CPU in C: lora_cpu.c, which is built with the package where there is a compiler for it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
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
    library.veneer_mixed.argtypes = (*[_POINTER] * 5, _INTEGER, _POINTER, _INTEGER)
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


class _Pair(ctypes.Structure):
    _fields_ = [("A", _POINTER), ("B", _POINTER), ("rank", _INTEGER), ("scale", ctypes.c_float)]


class Mixed:
    """Low-rank pairs (A, B, scale), and which of them each row of a batch gets, as the C part reads them.

    It points to the pairs' own memory: other numbers there are read by the next call, other memory needs another of it.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor, float]], rows: Sequence[Sequence[int]]) -> None:
        self.kept = pairs
        self.rows, self.out, self.width = len(rows), len(pairs[0][1]), pairs[0][0].shape[-1]
        self.rank = max(len(A) for A, _, _ in pairs)
        self.pairs = (_Pair * len(pairs))(*(_Pair(A.data_ptr(), B.data_ptr(), len(A), s) for A, B, s in pairs))
        alike = sorted(range(len(rows)), key=lambda row: tuple(rows[row]))  # an adapter's rows find it in the cache
        turns = [number for row in alike for pair in rows[row] or [-1] for number in (row, pair)]
        self.turns = (_INTEGER * len(turns))(*turns)

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor, float]], rows: Sequence[Sequence[int]]) -> Mixed | None:
        """None where this is not for such pairs."""
        fit = _library() is not None and all(_readable(A) and _readable(B) for A, B, _ in pairs)
        return cls(pairs, rows) if fit and pairs else None

    def beside(self, x: Tensor, y: Tensor) -> Tensor | None:
        """y + scale·B(A(x)) by each row's pairs, x [rows, ..., in], y [rows, ..., out]; None where it is not for x."""
        dtype = y.dtype
        if type(x) is not Tensor or type(y) is not Tensor or dtype not in _NUMBERS or x.dtype is not dtype:
            return None
        if not (x.is_cpu and y.is_cpu and x.is_contiguous() and y.is_contiguous() and x.numel()) or transforms():
            return None
        tokens = x.numel() // (self.rows * self.width)
        sizes = _sizes(tokens, self.width, self.out, self.rank, 0.0, _NUMBERS[dtype])
        to = torch.empty_like(y)
        done = _built().veneer_mixed(
            *(x.data_ptr(), y.data_ptr(), to.data_ptr(), ctypes.addressof(self.pairs), ctypes.addressof(self.turns)),
            *(len(self.turns) // 2, sizes[1], torch.get_num_threads()),
        )
        return to if done else None


def _readable(factor: Tensor) -> bool:
    plain = (type(factor) is Tensor or type(factor) is nn.Parameter) and factor.is_cpu and not transforms()
    return plain and factor.dtype is torch.float32 and factor.is_contiguous()


transforms: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Within torch.func's transforms tensors have no memory to point to."""


def _built() -> Any:
    library = _library()
    assert library is not None, "fits() says so"
    return library
