"""Veneer's own NF4 linear: four bits a weight, with bitsandbytes' keys in its checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import CorruptFile
from veneer.formats import bitsandbytes
from veneer.formats.quantized import Quantized
from veneer.ops import nf4, nf4_kernels
from veneer.ops.nf4 import Packed

STATE = "weight.quant_state.bitsandbytes__nf4"
_STATISTICS = ("absmax", "outer", "offset")
KEYS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", STATE)
"""What bitsandbytes calls the tensors of one NF4 weight in a checkpoint."""
_PIECE = 2**20
"""Weights that are quantized at a time: whole blocks of every size."""
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
nf4_kernels.KERNELS = {"c": nf4_kernels.KERNELS["c"], "bitsandbytes": bitsandbytes.NF4_KERNEL, **nf4_kernels.KERNELS}


class NF4Linear(nn.Linear):
    """y = x·Wᵀ + b with a frozen W in NF4, which is dense only while it is multiplied by; b stays as it is.

    `kernel` names the one that makes W dense, which then never gives way to another; None is the fastest that runs.
    """

    def __init__(self, linear: nn.Linear, block_size: int, double_quant: bool, kernel: str | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kernel = kernel
        self.hold(pack(linear.weight, block_size, double_quant), linear.weight.dtype)
        self.bias = linear.bias
        self.train(linear.training)

    def hold(self, packed: Packed, stored: torch.dtype) -> None:
        """Take a packed weight, made from one of dtype `stored`, in the place of the present one."""
        if self.kernel is not None and not packed.data.is_meta:
            nf4_kernels.check(self.kernel, packed.data.device.type)
        self.block_size, self.double_quant, self.stored = packed.block_size, packed.outer is not None, stored
        self.weight = nn.Parameter(packed.data, requires_grad=False)
        for name in _STATISTICS:
            self.register_buffer(name, vars(packed)[name], persistent=False)

    def wait(self) -> None:
        """Forget the magnitudes, so that the checkpoint keys of them are not asked for; `hold` brings others."""
        for name in _STATISTICS:
            self._buffers[name] = None

    @property
    def waits(self) -> bool:
        """Whether there are no magnitudes yet."""
        return self._buffers["absmax"] is None

    @property
    def packed(self) -> Packed:
        """The stored weight."""
        state: Any = self._buffers
        shape = (self.out_features, self.in_features)
        return Packed(self.weight.data, state["absmax"], shape, self.block_size, state["outer"], state["offset"])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as the numbers that its bits stand for, in `dtype` or that of the weight it was made from."""
        return nf4_kernels.dequantize(self.packed, dtype or self.stored, self.kernel)

    def forward(self, input: Tensor) -> Tensor:
        y = nf4_kernels.multiply(input, self.packed, self.kernel)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        kernel = self.kernel or nf4_kernels.chosen(self.weight.device.type)
        return f"{super().extra_repr()}, block_size={self.block_size}, bits={self.packed.bits:.3f}, kernel={kernel}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """Magnitudes move between devices and keep their dtype: a model cast to bfloat16 would round them for good."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            after = self._buffers[name]
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.waits:
            return
        packed = self.packed
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": packed.block_size,
            "dtype": str(self.stored).removeprefix("torch."),
            "shape": list(packed.shape),
        }
        destination[f"{prefix}weight.absmax"] = packed.absmax
        destination[f"{prefix}weight.quant_map"] = nf4.levels(packed.data.device).clone()
        if packed.outer is not None and packed.offset is not None:
            destination[f"{prefix}weight.nested_absmax"] = packed.outer
            destination[f"{prefix}weight.nested_quant_map"] = nf4.dynamic_levels(packed.data.device).clone()
            offset = packed.offset.item() if not packed.offset.is_meta else 0.0
            state |= {"nested_blocksize": nf4.OUTER, "nested_dtype": "float32", "nested_offset": offset}
        destination[f"{prefix}{STATE}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}weight" not in state_dict:  # a checkpoint of adapters alone; torch says what is missing
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        mine = {key: state_dict[prefix + key] for key in KEYS if prefix + key in state_dict}
        for key in KEYS[1:]:
            state_dict.pop(prefix + key, None)
        packed, stored = unpack(mine, f"{prefix}weight")
        if packed.shape != (self.out_features, self.in_features):
            raise CorruptFile(f"{prefix}weight is {list(packed.shape)}, not {[self.out_features, self.in_features]}.")
        device = self.weight.device
        held: dict[str, Any] = {name: t if (t := vars(packed)[name]) is None else t.to(device) for name in _STATISTICS}
        self.hold(replace(packed, data=self.weight.data, **held), stored)
        state_dict[f"{prefix}weight"] = packed.data
        super()._load_from_state_dict(state_dict, prefix, *args)


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
    """(a weight, the dtype it was made from) of a checkpoint's tensors by their `KEYS`; `name` is for the errors.

    Raises CorruptFile where one is missing or does not fit the others, or where the numbers mean other levels.
    """
    missing = [key for key in ("weight", "weight.absmax", STATE) if key not in tensors]
    if missing:
        lost = " and ".join(key.replace("weight", name, 1) for key in missing)
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
    data, absmax = tensors["weight"].contiguous().view(torch.uint8).reshape(-1, 1), tensors["weight.absmax"]
    outer = tensors.get("weight.nested_absmax") if nested else None
    blocks = -(-count // block_size)
    sizes = {"weight": (data, -(-count // 2)), "weight.absmax": (absmax, blocks)}
    if nested:
        sizes["weight.nested_absmax"] = (outer if outer is not None else absmax[:0], -(-blocks // nf4.OUTER))
    for key, (tensor, size) in sizes.items():
        if tensor.numel() != size:
            at = key.replace("weight", name, 1)
            raise CorruptFile(f"{at} has {tensor.numel()} numbers, not the {size} that a weight of {list(shape)} has.")
    levels = {"weight.quant_map": nf4.levels(), "weight.nested_quant_map": nf4.dynamic_levels()}
    for key, expected in levels.items():
        if key in tensors and not torch.equal(tensors[key].cpu().float(), expected):
            raise CorruptFile(f"{key.replace('weight', name, 1)} has other levels than NF4. Quantize the model again.")
    if not all(t.isfinite().all() for t in (absmax, outer, offset) if t is not None):
        raise CorruptFile(f"{name} has magnitudes that are not finite. Quantize the dense model again.")
    return Packed(data, absmax, shape, block_size, outer, None if offset is None else offset.to(data.device)), dtype


class NF4(Quantized):
    """The format of `NF4Linear`."""

    def dequantize(self, owner: nn.Module) -> Tensor:
        return _linear(owner).dense()

    def multiply(self, owner: nn.Module, parameter: str, x: Tensor) -> Tensor:
        return nf4_kernels.multiply(x, _linear(owner).packed, _linear(owner).kernel)

    def packer(self, owner: nn.Module) -> Callable[[nn.Linear], nn.Module]:
        how = _linear(owner).block_size, _linear(owner).double_quant, _linear(owner).kernel
        return lambda plain: NF4Linear(plain, *how)


def _linear(owner: nn.Module) -> NF4Linear:
    assert isinstance(owner, NF4Linear)
    return owner
