"""The machine a run has: its device, its threads, its memory, and the versions of what does the work."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from veneer.environment import spare_memory

PACKAGES = ("veneer", "torch", "transformers", "accelerate", "safetensors", "sacrebleu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")
STATUS = Path("/proc/self/status")


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def peak_bytes(device: torch.device) -> int:
    """The most memory in use at once so far: of the GPU where it does the work, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.is_file():  # rusage would not do: a spawned process starts there with its parent's peak
        return int(STATUS.read_bytes().split(b"VmHWM:")[1].split()[0]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


@contextmanager
def fitted_to_machine() -> Iterator[int]:
    """As many torch threads as this process may run at once, for a while; from then on, a sparing environment.

    torch counts the machine's cores. In a container that may use two of sixty-four, its threads would wait for each
    other most of the time: ten times slower, as measured with four threads on two cores.
    """
    spare_memory()
    before = torch.get_num_threads()
    threads = min(before, processors())
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def processors(quota: Path = QUOTA) -> int:
    """The processors that this process may use, by its affinity and its control group."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if quota.is_file():
        share, period = quota.read_text(encoding="ascii").split()
        if share != "max":
            allowed = min(allowed, -(-int(share) // int(period)))
    return max(1, allowed)


def versions() -> dict[str, str]:
    """What a result depends on."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def commit() -> str | None:
    """The commit of the working directory, and whether it is clean; None outside a repository."""
    try:
        commit, status = (
            subprocess.run(["git", *command], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}, with changes" if status else commit
