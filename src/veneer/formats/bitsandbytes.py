"""bitsandbytes' quantized linears: adapters train on them; writing a changed weight back would lose it to rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.formats.quantized import Quantized
from veneer.ops import nf4


class Linear4bit(Quantized):
    """NF4 and FP4 weights, two to a byte."""

    def prepare(self, module: nn.Module) -> None:
        """Keep 0.50.2 from repacking the weight for inference, where the CPU has AVX512-BF16: no gradient passes then.

        What was repacked already goes back to rows, each number as it stands: its magnitudes are bfloat16 by now.
        """
        linear: Any = module
        linear.support_avx512bf16_for_cpu = False
        state = linear.weight.quant_state
        if vars(state).get("packing_format_for_cpu"):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            magnitudes = state.absmax.T.flatten().float()
            state.original_nested = False  # else it would round the magnitudes to 8 bits once more
            linear.weight.data, linear.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                linear.weight.data, state
            )
            linear.weight.quant_state.absmax = magnitudes

    def dense(self, owner: nn.Module) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: Any = owner._parameters["weight"]
        dense: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return dense

    def multiply(self, owner: nn.Module, parameter: str, x: Tensor) -> Tensor:
        from bitsandbytes.autograd._functions import matmul_4bit

        weight: Any = owner._parameters[parameter]
        product: Tensor = matmul_4bit(x, weight.t(), quant_state=weight.quant_state)  # keeps nothing dense
        return product


class Linear8bitLt(Quantized):
    """LLM.int8() weights: one byte an element and a scale a row."""

    def dense(self, owner: nn.Module) -> Tensor:
        weight: Any = owner._parameters["weight"]
        state: Any = owner.state  # takes over the scales at the first forward
        scale: Tensor = state.SCB if weight.SCB is None else weight.SCB
        dense: Tensor = weight.data.float() * (scale.float() / 127).unsqueeze(1)
        return dense


def dequantize_nf4(packed: nf4.Packed, dtype: torch.dtype) -> Tensor:
    """The dense weight of Veneer's NF4 by bitsandbytes' operator, which has the same bytes."""
    import bitsandbytes  # noqa: F401  # registers the operators

    operator = torch.ops.bitsandbytes.dequantize_4bit.default
    flat = (torch.Size(packed.shape).numel(),)  # given rows that blocks cross, 0.50.2 reads wrong magnitudes on a CPU
    dense: Tensor = operator(packed.data, nf4.magnitudes(packed), packed.block_size, "nf4", flat, dtype)
    return dense.view(packed.shape)
