"""bitsandbytes' quantized linears."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import PlaceError
from veneer.formats.quantized import Quantized
from veneer.ops import nf4
from veneer.ops.nf4_kernels import Kernel


class Linear4bit(Quantized):
    """NF4 and FP4 weights, two to a byte."""

    def prepare(self, module: nn.Module) -> None:
        """Switch off what bitsandbytes 0.50 does on some CPUs at the first forward in evaluation.

        It packs the weight in another order, through which no gradient comes back, and rounds its statistics.
        """
        stored: Any = module
        state = stored.weight.quant_state
        if state is not None and vars(state).get("packing_format_for_cpu", False):
            raise PlaceError(
                "bitsandbytes has repacked this model for inference on a CPU, and no gradient goes through it any "
                "more. Load the base again, and attach before the first forward."
            )
        stored.support_avx512bf16_for_cpu = False

    def dequantize(self, owner: nn.Module) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight = owner._parameters["weight"]
        dense: Tensor = dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[union-attr]
        return dense

    def multiply(self, owner: nn.Module, parameter: str, x: Tensor) -> Tensor:
        from bitsandbytes.autograd._functions import matmul_4bit

        weight: Any = owner._parameters[parameter]
        product: Tensor = matmul_4bit(x, weight.t(), quant_state=weight.quant_state)  # keeps nothing dense
        return product

    def packer(self, owner: nn.Module) -> Callable[[nn.Linear], nn.Module]:
        from bitsandbytes import nn as theirs

        kinds: Any = theirs
        stored: Any = owner
        old, dtype, device = stored.weight, stored.compute_dtype, stored.weight.device
        how = {name: vars(old)[name] for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
        repacks = stored.support_avx512bf16_for_cpu

        def pack(plain: nn.Linear) -> nn.Module:
            new = kinds.Linear4bit(
                plain.in_features, plain.out_features, bias=False, compute_dtype=dtype, device="meta"
            )
            new.support_avx512bf16_for_cpu = repacks
            new.weight = kinds.Params4bit(plain.weight.data, requires_grad=False, module=new, **how).to(device)
            new.weight.module, new.bias = plain, plain.bias
            return new  # type: ignore[no-any-return]

        return pack


class Linear8bitLt(Quantized):
    """LLM.int8() weights: one byte an element and a scale a row."""

    def dequantize(self, owner: nn.Module) -> Tensor:
        weight: Any = owner._parameters["weight"]
        state: Any = owner.state  # takes over the scales at the first forward
        scale: Tensor = state.SCB if weight.SCB is None else weight.SCB
        dense: Tensor = weight.data.float() * (scale.float() / 127).unsqueeze(1)
        return dense

    def packer(self, owner: nn.Module) -> Callable[[nn.Linear], nn.Module]:
        from bitsandbytes import nn as theirs

        kinds: Any = theirs
        state: Any = owner.state
        threshold, device = state.threshold, owner._parameters["weight"].device  # type: ignore[union-attr]

        def pack(plain: nn.Linear) -> nn.Module:
            size = plain.in_features, plain.out_features
            new = kinds.Linear8bitLt(*size, bias=False, has_fp16_weights=False, threshold=threshold, device="meta")
            new.weight = kinds.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False).to(device)
            new.bias = plain.bias
            return new  # type: ignore[no-any-return]

        return pack


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
