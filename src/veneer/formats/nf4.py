"""Veneer's own NF4 linear: four bits a weight, with bitsandbytes' keys in its checkpoints."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from veneer import layers
from veneer.errors import CorruptFile, NotMergeable
from veneer.formats import bitsandbytes
from veneer.formats.dense import Linear
from veneer.ops import nf4, nf4_kernels
from veneer.ops.nf4 import Packed

_STATE = "weight.quant_state.bitsandbytes__nf4"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
nf4_kernels.KERNELS = {"bitsandbytes": bitsandbytes.dequantize_nf4, **nf4_kernels.KERNELS}


class NF4Linear(nn.Linear):
    """y = x·Wᵀ + b with a frozen W in NF4, which is dense only while it is multiplied by; b stays as it is."""

    def __init__(self, linear: nn.Linear, block_size: int, double_quant: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.block_size, self.stored = block_size, linear.weight.dtype
        packed = nf4.quantize(linear.weight, block_size, double_quant)
        self.weight = nn.Parameter(packed.data, requires_grad=False)
        self.register_buffer("absmax", packed.absmax, persistent=False)
        self.register_buffer("outer", packed.outer, persistent=False)
        self.register_buffer("offset", packed.offset, persistent=False)
        self.bias = linear.bias
        self.train(linear.training)

    @property
    def packed(self) -> Packed:
        """The stored weight."""
        state: Any = self._buffers
        shape = (self.out_features, self.in_features)
        return Packed(self.weight.data, state["absmax"], shape, self.block_size, state["outer"], state["offset"])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as the numbers that its bits stand for, in `dtype` or that of the weight it was made from."""
        return nf4_kernels.dequantize(self.packed, dtype or self.stored)

    def forward(self, input: Tensor) -> Tensor:
        y = nf4_kernels.multiply(input, self.packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block_size}, bits={self.packed.bits:.3f}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
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
        destination[f"{prefix}{_STATE}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}weight" not in state_dict:  # a checkpoint of adapters alone; torch says what is missing
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        mine = {key: state_dict.pop(f"{prefix}weight.{key}", None) for key in ("absmax", "nested_absmax")}
        for key in ("weight.quant_map", "weight.nested_quant_map"):
            state_dict.pop(f"{prefix}{key}", None)
        packed_state = state_dict.pop(f"{prefix}{_STATE}", None)
        if packed_state is None or mine["absmax"] is None:
            raise CorruptFile(f"{prefix}weight has no NF4 statistics beside it. Load an NF4 checkpoint, or quantize.")
        state = json.loads(bytes(packed_state.tolist()))
        if state["dtype"] not in _DTYPES:
            raise CorruptFile(f"{prefix}weight stands for a weight of {state['dtype']}, which NF4 is not made from.")
        if state["quant_type"] != "nf4" or tuple(state["shape"]) != self.packed.shape:
            raise CorruptFile(f"{prefix}weight is {state['quant_type']} of {state['shape']}, not this layer's NF4.")
        self.block_size, self.stored = state["blocksize"], _DTYPES[state["dtype"]]
        device = self.weight.device
        self.absmax = mine["absmax"].to(device)
        self.outer = None if mine["nested_absmax"] is None else mine["nested_absmax"].to(device)
        self.offset = None if self.outer is None else torch.tensor(state["nested_offset"], device=device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class NF4(Linear):
    """The format of `NF4Linear`."""

    def shape(self, owner: nn.Module, parameter: str) -> tuple[int, ...]:
        return _linear(owner).packed.shape if parameter == "weight" else super().shape(owner, parameter)

    def functional(self, module: nn.Module) -> bool:
        return False

    def map(self, module: nn.Module) -> layers.LinearMap:
        return layers.Matrix()

    def count(self, owner: nn.Module, parameter: str) -> int:
        return torch.Size(self.shape(owner, parameter)).numel()

    def read(self, owner: nn.Module, parameter: str) -> Tensor:
        if parameter != "weight":
            return super().read(owner, parameter)
        return _linear(owner).dense()

    def multiply(self, owner: nn.Module, parameter: str, x: Tensor) -> Tensor:
        return nf4_kernels.multiply(x, _linear(owner).packed)

    def write(self, owner: nn.Module, parameter: str, weight: Tensor) -> None:
        if parameter != "weight":
            return super().write(owner, parameter, weight)
        raise NotMergeable(
            "it stores its weight quantized in NF4, and rounding it again would lose most of a small change. "
            "Merge into a dense copy of the base, or keep the adapter attached."
        )


def _linear(owner: nn.Module) -> NF4Linear:
    assert isinstance(owner, NF4Linear)
    return owner
