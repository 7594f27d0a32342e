"""The C libraries that are built with the package where there is a compiler for them."""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec

NOT_BUILT = "it was not built: reinstall Veneer where there is a C compiler"


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The library of this name; None where it was not built."""
    spec = find_spec(f"veneer.ops.{name}")  # not a module: where an extension lies is where setuptools put it
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)
