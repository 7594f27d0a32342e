"""A Triton kernel or torch's own operations: on a GPU, whichever was faster when both were tried there.

Where a kernel wins depends on the GPU, on widths, ranks and numbers of tokens, so nobody knows it beforehand. The first
call of each kind computes both, compares their numbers and times them; later calls of that kind take the faster. Tokens
and ranks are counted by the next power of two. `choices` tells what was found, and `request` asks for one of the two:

| kernel      | what                                                 |
|-------------|------------------------------------------------------|
| `triton`    | float32, bfloat16 and float16, with Triton installed |
| `reference` | plain torch: the specification, in every dtype       |

What was asked for by name runs or raises. What is only tried, and does not run or has other numbers, is passed over
with a warning. Compiled code, torch.func, tensors that are no plain ones, a backward that is itself to be
differentiated, and what a dispatch mode looks on at (as selective checkpointing does, which counts operations) are
torch's own, whatever was asked for: nothing else can be looked into.

Two runs may choose differently and round differently. Where torch is to be deterministic
(`torch.use_deterministic_algorithms`) its own operations are taken. Nothing is tried while a CUDA graph is captured.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import PlaceError
from veneer.ops.lora_cpu import transforms

TRITON, REFERENCE = "triton", "reference"
DEVICE = "cuda"
"""The kind of device that has the kernels."""
FAST = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of all kernels; float64 and integers are the reference's."""
ROUNDS = 5
"""How often each is timed; the least counts."""
TOLERANCE = 0.02
"""Distance of the numbers of both, relative to their norm: several roundings to bfloat16, and no wrong element."""

Way = Callable[[], Tensor]
Kind = tuple[Any, ...]


@dataclass(frozen=True)
class Choice:
    """What was found for a kind of call: its name with dtype, rows and width of each tensor, and the way taken."""

    kind: str
    kernel: str
    milliseconds: tuple[float, float] | None
    """Of Triton and of the reference, as the stream saw them, calls included; None where Triton's was passed over."""

    def __str__(self) -> str:
        took = "Triton's does not serve" if self.milliseconds is None else "{:.3f} ms against {:.3f}"
        return f"{self.kind}: {self.kernel} ({took.format(*self.milliseconds or ())})"


_found: dict[Kind, Choice] = {}
_asked: str | None = None


def request(name: str | None) -> str | None:
    """Compute on a GPU by the kernels of this name from now on, in all threads; None chooses by trial.

    Gives what held before. Raises PlaceError for another name, for Triton where there is no GPU or no Triton, and at a
    call on a GPU which its kernels cannot serve. What a CPU computes is left alone.
    """
    global _asked
    if name not in (TRITON, REFERENCE, None):
        raise PlaceError(f"There is no kernel {name!r}. Choose {TRITON!r}, {REFERENCE!r}, or None for the faster.")
    if name == TRITON and missing() is not None:
        raise PlaceError(f"Triton's kernels were asked for and cannot run here: {missing()}. Ask for none.")
    before, _asked = _asked, name
    return before


def choices() -> list[Choice]:
    """What this process has chosen so far."""
    return list(_found.values())


@functools.cache
def no_triton(device_type: str) -> str | None:
    """Why Triton's kernels cannot run on a kind of device; None where they can."""
    if device_type != "cuda":
        return "it is for CUDA"
    return None if find_spec("triton") else "Triton is not installed"


@functools.cache
def missing() -> str | None:
    """Why Triton's kernels cannot run in this process; None where they can."""
    return no_triton(DEVICE) if torch.cuda.is_available() else "there is no GPU"


def measured(kernel: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Lets `kernel`, "module.function" within `ops`, take the place of its reference; both take the same arguments."""

    def over(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(reference)
        def run(*inputs: Any) -> Tensor:
            if torch.compiler.is_compiling() or not wanted(kernel, [a for a in inputs if isinstance(a, Tensor)]):
                return reference(*inputs)
            module, name = kernel.split(".")
            function = getattr(import_module(f"veneer.ops.{module}"), name)
            kind = (name, inputs[0].device, *map(_size, inputs))
            return faster(kind, lambda: function(*inputs), lambda: reference(*inputs))

        return run

    return over


def wanted(kernel: str, tensors: Sequence[Tensor]) -> bool:
    """Whether a Triton kernel may serve these tensors; raises PlaceError where it was asked for and cannot."""
    if tensors[0].device.type != DEVICE or _asked == REFERENCE or transforms():
        return False
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        return False
    if torch._C._len_torch_dispatch_stack() or any(type(each) not in (Tensor, nn.Parameter) for each in tensors):
        return False
    reasons = [missing()]
    reasons += [f"it has no {each.dtype}" for each in tensors if each.is_floating_point() and each.dtype not in FAST]
    reason = next(filter(None, reasons), None)
    if reason is not None and _asked == TRITON:
        raise PlaceError(
            f"The kernel {kernel} of Triton, which was asked for by name, cannot run: {reason}. Ask for {REFERENCE!r}, "
            "or for none."
        )
    return reason is None


def faster(kind: Kind, kernel: Way, reference: Way) -> Tensor:
    """What one of the two computes: that which was asked for, or the faster of its kind. kind[1] is the device."""
    device = kind[1]
    with torch.cuda.device(device if device.type == "cuda" else -1):
        if _asked is not None:
            return kernel() if _asked == TRITON else reference()
        if torch.are_deterministic_algorithms_enabled():
            return reference()
        if kind not in _found and not _capturing(device):
            _try(kind, kernel, reference)
        choice = _found.get(kind)
        return kernel() if choice is not None and choice.kernel == TRITON else reference()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _try(kind: Kind, kernel: Way, reference: Way) -> None:
    """Find the choice for a kind, if these numbers allow one: what is not finite says nothing about a kernel."""
    name, device, *sizes = kind
    expected = reference()
    size = expected.float().norm()
    if not (expected.numel() and size.isfinite()):
        return
    what = f"{name} on {device}, {', '.join(str(each).replace('torch.', '') for each in sizes if each is not None)}"
    reason = None
    try:
        distance = (kernel().float() - expected.float()).norm()
        if not distance <= TOLERANCE * size:
            reason = f"is {float(distance / size):.2g} off the reference"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler, a driver, or the kernel's own
        reason = f"does not run ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
    if reason is not None:
        warnings.warn(f"The Triton kernel for {what} {reason}; torch's own operations take its place.", stacklevel=2)
        _found[kind] = Choice(what, REFERENCE, None)
        return
    ways = kernel, reference
    times = [[seconds(way, device) for way in ways] for _ in range(ROUNDS)]
    ours, plain = (min(each) for each in zip(*times, strict=True))
    _found[kind] = Choice(what, TRITON if ours < plain else REFERENCE, (ours * 1e3, plain * 1e3))


def seconds(way: Way, device: torch.device) -> float:
    """How long a call takes on a device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    way()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _size(value: Any) -> Any:
    """What a kind keeps of an argument: of a tensor its dtype, its rows as a power of two, and its width."""
    if isinstance(value, Tensor):
        width = value.shape[-1] if value.dim() else 1
        return value.dtype, counted(value.numel() // max(1, width)), width
    return value if isinstance(value, torch.dtype) else None


def counted(number: int) -> int:
    """The next power of two: numbers that share a choice."""
    return 1 << max(0, number - 1).bit_length()
