"""bitsandbytes' quantized linears: adapters train on them; writing a changed weight back would lose it to rounding."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from veneer import layers
from veneer.errors import NotMergeable
from veneer.formats.dense import Linear
from veneer.ops import nf4
from veneer.ops.nf4_kernels import Kernel


class _Quantized(Linear):
    """What both kinds share: the logical shape is the module's own, not that of the packed storage."""

    def shape(self, owner: nn.Module, parameter: str) -> tuple[int, ...]:
        assert isinstance(owner, nn.Linear)
        return owner.out_features, owner.in_features

    def functional(self, module: nn.Module) -> bool:
        return False

    def map(self, module: nn.Module) -> layers.LinearMap:
        return layers.Matrix()

    def count(self, owner: nn.Module, parameter: str) -> int:
        if parameter != "weight":
            return super().count(owner, parameter)
        out, in_ = self.shape(owner, parameter)
        return out * in_

    def write(self, owner: nn.Module, parameter: str, weight: Tensor) -> None:
        raise NotMergeable(
            f"a {type(owner).__name__} stores its weight quantized, and rounding it again would lose most of a small "
            "change. Load the base in bfloat16 and merge there, or keep the adapter attached."
        )


class Linear4bit(_Quantized):
    """NF4 and FP4 weights, two to a byte."""

    def read(self, owner: nn.Module, parameter: str) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight = owner._parameters[parameter]
        dense: Tensor = dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[union-attr]
        return dense

    def multiply(self, owner: nn.Module, parameter: str, x: Tensor) -> Tensor:
        from bitsandbytes.autograd._functions import matmul_4bit

        weight: Any = owner._parameters[parameter]
        product: Tensor = matmul_4bit(x, weight.t(), quant_state=weight.quant_state)  # keeps nothing dense
        return product


class Linear8bitLt(_Quantized):
    """LLM.int8() weights: one byte an element and a scale a row."""

    def read(self, owner: nn.Module, parameter: str) -> Tensor:
        weight: Any = owner._parameters[parameter]
        state: Any = owner.state  # takes over the scales at the first forward
        scale: Tensor = state.SCB if weight.SCB is None else weight.SCB
        dense: Tensor = weight.data.float() * (scale.float() / 127).unsqueeze(1)
        return dense


def _dequantize_nf4(packed: nf4.Packed, dtype: torch.dtype) -> Tensor:
    import bitsandbytes  # noqa: F401  # registers the operators

    operator = torch.ops.bitsandbytes.dequantize_4bit.default
    flat = (torch.Size(packed.shape).numel(),)  # given rows that blocks cross, 0.50.2 reads wrong magnitudes on a CPU
    dense: Tensor = operator(packed.data, nf4.magnitudes(packed), packed.block_size, "nf4", flat, dtype)
    return dense.view(packed.shape)


@functools.cache
def _missing(device_type: str) -> str | None:
    return None if find_spec("bitsandbytes") else "bitsandbytes is not installed"


NF4_KERNEL = Kernel(_dequantize_nf4, _missing)
"""The dense weight of Veneer's NF4 by bitsandbytes' operator, which has the same bytes."""
