"""What a process on a CPU takes beside its tensors: itself, and what glibc's malloc keeps of what was freed."""

from __future__ import annotations

import os
import platform
from pathlib import Path

KEPT, KEPT_PACKED = 0.14, 0.20
"""Bytes in holes of glibc's heap for each byte that a step makes; with a base in NF4, whose products make more.

Chosen after bench/plan.py's measured steps (glibc 2.36): shares of 0.08 to 0.15, and 0.20 where the base is packed."""
HIGHEST = 0.25
"""Of the upper bound."""


def resident() -> int:
    """Bytes of memory that this process takes now; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def kept(made: float, packed: bool) -> tuple[float, float]:
    """(expected, at most) bytes that malloc keeps of `made`, those of a step's tensors that lie in its heap.

    Nothing where another malloc than glibc's is there, or where `MALLOC_MMAP_THRESHOLD_` in the environment has it give
    all back.
    """
    if platform.libc_ver()[0] != "glibc" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return 0.0, 0.0
    return made * (KEPT_PACKED if packed else KEPT), made * HIGHEST
