"""Devices by name, what they hold and do (devices.toml), and what CUDA and its allocator add to a model's own bytes."""

from __future__ import annotations

import os
import re
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch

from veneer.errors import PlanError, closest

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Device:
    """What a device holds and does.

    memory: bytes. bandwidth: bytes a second, or None where it is not known. flops: floating-point operations a second
    by dtype (`"bfloat16"`, …); empty where they are not known. kind: "cuda", "mps" or "cpu". source: where the figures
    are from.
    """

    name: str
    memory: int
    bandwidth: float | None
    flops: Mapping[str, float]
    kind: str
    source: str

    def rate(self, dtype: str) -> float | None:
        """Operations a second in a dtype; where there are no units for it, those of float32."""
        return self.flops.get(dtype, self.flops.get("float32"))


@dataclass(frozen=True)
class Allocator:
    """How torch's CUDA allocator rounds, from its source (c10/cuda/CUDACachingAllocator), in bytes.

    block: every tensor is a multiple of it. A tensor of at most `small` lies in a segment of `small_segment`, one below
    `large` in one of `medium_segment`, and a larger one in a segment of its own, a multiple of `round_large`.
    """

    block: int = 512
    small: int = MIB
    small_segment: int = 2 * MIB
    large: int = 10 * MIB
    medium_segment: int = 20 * MIB
    round_large: int = 2 * MIB

    def tensor(self, size: int) -> int:
        """What a tensor of `size` bytes adds to `memory_allocated`."""
        return max(self.block, -(-size // self.block) * self.block)

    def segment(self, size: int) -> int:
        """What a new segment for a tensor of `size` bytes adds to `memory_reserved`."""
        if size <= self.small:
            return self.small_segment
        if size < self.large:
            return self.medium_segment
        return -(-size // self.round_large) * self.round_large


CUDA_ALLOCATOR = Allocator()
CUBLAS_WORKSPACE = 8 * MIB + 128 * 2**10
"""cuBLAS's workspace below compute capability 9.0 (`:4096:2:16:8`, torch's CUDABlas.cpp), which counts as allocated."""
CUBLAS_WORKSPACE_HOPPER = 32 * MIB
"""The same from compute capability 9.0 on (`:4096:8`)."""
CUDA_CONTEXT = (0.25 * GIB, 0.45 * GIB, 0.8 * GIB)
"""Low, expected and high: what a process holds on a GPU beside torch's tensors; nvidia-smi counts it, torch does not.

It depends on the driver, on the GPU and on how many kernels were loaded. These three are estimates, no measurements;
all kernels loaded at once come to 1.3 GiB (transformers' page on the anatomy of a model's memory)."""


@cache
def _table() -> dict[str, Device]:
    found = {}
    kinds = {"nvidia": "cuda", "amd": "cuda", "apple": "mps"}
    text = files("veneer.plan").joinpath("devices.toml").read_text(encoding="utf-8")
    for vendor, entries in tomllib.loads(text).items():
        for name, entry in entries.items():
            flops = {key: rate * 1e12 for key, rate in entry.items() if key in ("bfloat16", "float16", "float32")}
            found[name] = Device(
                name, entry["memory"] * MIB, entry["bandwidth"] * 1e9, flops, kinds[vendor], entry["source"]
            )
    return found


def names() -> list[str]:
    """Every device there is."""
    return list(_table())


def device(name: str) -> Device:
    """A device by name (`rtx-4090`, `"NVIDIA A100-SXM4-80GB"`), by memory alone (`24GB`), or this machine (`auto`).

    A `GB` of a GPU's memory is a GiB, as vendors mean it. PlanError where nothing is known by that name.
    """
    if name == "auto":
        return this_machine()
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(g|gb|gib|m|mb|mib)", name.strip().lower())
    if size:
        unit = GIB if size[2][0] == "g" else MIB
        memory = round(float(size[1]) * unit)
        if memory == 0:
            raise PlanError(f"A device of '{name}' holds nothing; say how much memory it has, such as 24GB.")
        return Device(name.strip(), memory, None, {}, "cuda", "its memory, as given")
    said = _words(name)
    exact = [each for each in _table() if _words(each) == said]
    within = sorted((each for each in _table() if _words(each) <= said), key=lambda each: len(_words(each)))
    around = [each for each in _table() if said and said <= _words(each)]
    found = exact or within[-1:] or around
    if len(found) > 1:
        raise PlanError(f"'{name}' is one of several devices: {', '.join(found)}. Name one.")
    if not found:
        near = closest(name.lower(), names())
        raise PlanError(f"No device '{name}'.{near} A size such as 24GB does too, and auto is this machine.")
    return _table()[found[0]]


def _words(name: str) -> set[str]:
    """`NVIDIA A100-SXM4-80GB` and `rtx4090` in the words that the table's names are made of."""
    spread = re.sub(r"^(rtx)(?=\d)", r"\1 ", name.strip().lower())
    return set(re.findall(r"[a-z0-9.]+", spread))


@cache
def this_machine() -> Device:
    """This machine's accelerator, or its CPU: memory as the system says it, rates measured in half a second."""
    where = torch.accelerator.current_accelerator(check_available=True)
    if where is not None and where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        name, memory, kind = properties.name, properties.total_memory, "cuda"
    else:
        name, memory, kind = "cpu", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "cpu"
    flops = {str(dtype).removeprefix("torch."): _multiply(dtype, kind) for dtype in (torch.float32, torch.bfloat16)}
    return Device(name, memory, _copy(kind), flops, kind, f"measured with {torch.get_num_threads()} threads")


def _multiply(dtype: torch.dtype, kind: str) -> float:
    side = 512 if kind == "cpu" else 4096
    a, b = (torch.ones(side, side, dtype=dtype, device=kind) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, kind)


def _copy(kind: str) -> float:
    source = torch.ones(16 * MIB, dtype=torch.float32, device=kind)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), kind)


def _best(run: Callable[[], object], kind: str) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
