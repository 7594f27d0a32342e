"""Modules that hold weights in NF4, and the keys of such a weight in a checkpoint, which are bitsandbytes' own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from veneer.errors import CorruptFile
from veneer.formats import bitsandbytes
from veneer.ops import nf4, nf4_kernels
from veneer.ops.nf4 import Packed

STATE = ".quant_state.bitsandbytes__nf4"
KEYS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
"""What bitsandbytes calls the tensors of one NF4 weight in a checkpoint, behind the weight's own name."""
_STATISTICS = ("absmax", "outer", "offset")
_PIECE = 2**20
"""Weights that are quantized at a time: whole blocks of every size."""
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
nf4_kernels.KERNELS = {"c": nf4_kernels.KERNELS["c"], "bitsandbytes": bitsandbytes.NF4_KERNEL, **nf4_kernels.KERNELS}

Self = TypeVar("Self", bound="Holder")


@dataclass(frozen=True)
class Facts:
    """What a packed weight stands for, and the dtype that it was made from."""

    shape: tuple[int, ...]
    block_size: int
    double_quant: bool
    stored: torch.dtype


class Holder(nn.Module):
    """A module with weights in NF4: bytes as a parameter of the weight's name, magnitudes as buffers beside it.

    `facts` has an entry for each of them. `kernel` names the one that makes them dense, which then never gives way to
    another; None is the fastest that runs.
    """

    facts: dict[str, Facts]
    kernel: str | None

    def hold(self, name: str, packed: Packed, stored: torch.dtype) -> None:
        """Take a packed weight, made from one of dtype `stored`, in the place of the present one."""
        if self.kernel is not None and not packed.data.is_meta:
            nf4_kernels.check(self.kernel, packed.data.device.type)
        self.facts[name] = Facts(packed.shape, packed.block_size, packed.outer is not None, stored)
        self._parameters[name] = nn.Parameter(packed.data, requires_grad=False)
        for statistic, buffer in buffers(name).items():
            self.register_buffer(buffer, vars(packed)[statistic], persistent=False)

    def wait(self) -> None:
        """Forget the magnitudes, so that the checkpoint keys of them are not asked for; `hold` brings others."""
        for name in self.facts:
            self._buffers.update(dict.fromkeys(buffers(name).values()))

    @property
    def waiting(self) -> list[str]:
        """The weights without magnitudes yet."""
        return [name for name in self.facts if self._buffers[buffers(name)["absmax"]] is None]

    def held(self, name: str) -> Packed:
        """A stored weight."""
        facts, data = self.facts[name], self._parameters[name]
        state: dict[str, Any] = {statistic: self._buffers[buffer] for statistic, buffer in buffers(name).items()}
        assert data is not None
        return Packed(data.data, shape=facts.shape, block_size=facts.block_size, **state)

    def numbers(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A weight as the numbers that its bits stand for, in `dtype` or that of the weight it was made from."""
        return nf4_kernels.dequantize(self.held(name), dtype or self.facts[name].stored, self.kernel)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Magnitudes move between devices and keep their dtype: a model cast to bfloat16 would round them for good."""
        before = {buffer: self._buffers[buffer] for name in self.facts for buffer in buffers(name).values()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            after = self._buffers[name]
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        waiting = self.waiting
        for name in self.facts:
            if name not in waiting:
                statistics = _statistics(self.held(name), self.facts[name].stored)
                destination.update({f"{prefix}{name}{key}": tensor for key, tensor in statistics.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, facts in list(self.facts.items()):
            whole, data = f"{prefix}{name}", self._parameters[name]
            if whole not in state_dict or data is None:  # a checkpoint of adapters alone; torch says what is missing
                continue
            mine = {key: state_dict[whole + key] for key in KEYS if whole + key in state_dict}
            for key in KEYS[1:]:
                state_dict.pop(whole + key, None)
            packed, stored = unpack(mine, whole)
            if packed.shape != facts.shape:
                raise CorruptFile(f"{whole} is {list(packed.shape)}, not {list(facts.shape)}.")
            moved: dict[str, Any] = {s: t if (t := vars(packed)[s]) is None else t.to(data.device) for s in _STATISTICS}
            self.hold(name, replace(packed, data=data.data, **moved), stored)
            state_dict[whole] = packed.data
        super()._load_from_state_dict(state_dict, prefix, *args)


def buffers(name: str) -> dict[str, str]:
    """What a holder calls the statistics of a weight."""
    return {statistic: statistic if name == "weight" else f"{name}_{statistic}" for statistic in _STATISTICS}


def _statistics(packed: Packed, stored: torch.dtype) -> dict[str, Tensor]:
    """What a checkpoint has of a weight beside its bytes, by the `KEYS`."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": packed.block_size,
        "dtype": str(stored).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    found = {".absmax": packed.absmax, ".quant_map": nf4.levels(packed.data.device).clone()}
    if packed.outer is not None and packed.offset is not None:
        found[".nested_absmax"] = packed.outer
        found[".nested_quant_map"] = nf4.dynamic_levels(packed.data.device).clone()
        offset = packed.offset.item() if not packed.offset.is_meta else 0.0
        state |= {"nested_blocksize": nf4.OUTER, "nested_dtype": "float32", "nested_offset": offset}
    return found | {STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def finite(weight: Tensor) -> bool:
    """Whether no weight is NaN or infinite, by the extremes: several times as fast as asking each."""
    return all(bool(extreme.isfinite()) for extreme in weight.aminmax())


def pack(weight: Tensor, block_size: int, double_quant: bool) -> Packed:
    """A finite weight in NF4, a piece after the other: what quantizing takes beside it does not grow with it."""
    flat = weight.detach().flatten()
    data = torch.empty(-(-len(flat) // 2), 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-len(flat) // block_size), device=weight.device, dtype=torch.float32)
    for start in range(0, 0 if weight.is_meta else len(flat), _PIECE):  # on meta there is nothing to compute
        piece = nf4_kernels.quantize(flat[start : start + _PIECE], block_size, False)
        data[start // 2 :][: len(piece.data)] = piece.data
        absmax[start // block_size :][: len(piece.absmax)] = piece.absmax
    packed = Packed(data, absmax, tuple(weight.shape), block_size)
    return nf4.quantize_magnitudes(packed) if double_quant else packed


def unpack(tensors: Mapping[str, Tensor], name: str) -> tuple[Packed, torch.dtype]:
    """(a weight, the dtype it was made from) of a checkpoint's tensors by their `KEYS`; `name` is what it is called.

    Raises CorruptFile where one is missing or does not fit the others, or where the numbers mean other levels.
    """
    missing = [key for key in ("", ".absmax", STATE) if key not in tensors]
    if missing:
        lost = " and ".join(name + key for key in missing)
        raise CorruptFile(f"{name} has no NF4 statistics beside it: {lost} is missing. Load an NF4 checkpoint.")
    try:
        state = json.loads(bytes(tensors[STATE].tolist()))
        kind, shape, block_size = state["quant_type"], tuple(state["shape"]), int(state["blocksize"])
        nested, dtype = "nested_blocksize" in state, _DTYPES.get(state["dtype"])
        offset = torch.tensor(float(state["nested_offset"])) if nested else None
        outer_size = int(state["nested_blocksize"]) if nested else nf4.OUTER
        count = math.prod(shape)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{name}.quant_state is not readable ({error}). Quantize the dense model again.") from None
    if kind != "nf4" or outer_size != nf4.OUTER:
        raise CorruptFile(f"{name} is {kind} in blocks of {outer_size} magnitudes, not NF4 in blocks of {nf4.OUTER}.")
    if dtype is None:
        raise CorruptFile(f"{name} stands for a weight of {state['dtype']}, which NF4 is not made from.")
    data, absmax = tensors[""].contiguous().view(torch.uint8).reshape(-1, 1), tensors[".absmax"]
    outer = tensors.get(".nested_absmax") if nested else None
    blocks = -(-count // block_size)
    sizes = {"": (data, -(-count // 2)), ".absmax": (absmax, blocks)}
    if nested:
        sizes[".nested_absmax"] = (outer if outer is not None else absmax[:0], -(-blocks // nf4.OUTER))
    for key, (tensor, size) in sizes.items():
        if tensor.numel() != size:
            raise CorruptFile(
                f"{name}{key} has {tensor.numel()} numbers, not the {size} that a weight of {list(shape)} has."
            )
    levels = {".quant_map": nf4.levels(), ".nested_quant_map": nf4.dynamic_levels()}
    for key, expected in levels.items():
        if key in tensors and not torch.equal(tensors[key].cpu().float(), expected):
            raise CorruptFile(f"{name}{key} has other levels than NF4. Quantize the model again.")
    if not all(t.isfinite().all() for t in (absmax, outer, offset) if t is not None):
        raise CorruptFile(f"{name} has magnitudes that are not finite. Quantize the dense model again.")
    return Packed(data, absmax, shape, block_size, outer, None if offset is None else offset.to(data.device)), dtype
