"""What a process on a CPU takes beside its tensors: itself, and what glibc's malloc keeps of what was freed."""

from __future__ import annotations

import os
import platform
from pathlib import Path

KEPT, MOST = 0.85, 1.25
"""Expected and at most: bytes in holes of glibc's heap for each byte that a block makes in a step, recomputed ones too.

Chosen after bench/plan.py's measured steps (glibc 2.36) of models of eight blocks, which leave 0.6 to 1.2. A model of
32 blocks at one length leaves no more than one of eight; batches of many lengths leave more the deeper it is."""


def resident() -> int:
    """Bytes of memory that this process takes now; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def kept(made: float) -> tuple[float, float]:
    """(expected, at most) bytes that malloc keeps, where a block makes `made` bytes of tensors that lie in its heap.

    Nothing where another malloc than glibc's is there, or where `MALLOC_MMAP_THRESHOLD_` in the environment has it give
    all back.
    """
    if platform.libc_ver()[0] != "glibc" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return 0.0, 0.0
    return made * KEPT, made * MOST
