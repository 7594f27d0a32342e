"""Python's collector of cycles, where it would only be in the way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within, the collector stands still: of thousands of new modules and whole libraries none is garbage, and it would
    look at all objects of the process again and again, so that each takes the longer the more there are."""
    ran = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if ran:
            gc.enable()
