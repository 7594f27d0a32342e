"""transformers' linears in float8: a weight of 8-bit numbers with a scale a block or a row.

Their products need a GPU. Reading is the product of numbers and scales, wherever they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import UnreadableWeight
from veneer.formats.quantized import Quantized


class FineGrained(Quantized):
    """FP8Linear: a scale for each block [rows, columns] of the weight, or one for all; it has a backward of its own."""

    def count(self, owner: nn.Module, parameter: str) -> int:
        return super().count(owner, parameter) if parameter in ("weight", "bias") else 0

    def dequantize(self, owner: nn.Module) -> Tensor:
        linear: Any = owner
        scale, block = linear.weight_scale_inv.detach().float(), linear.block_size
        if linear.weight.dtype == torch.int8:
            raise UnreadableWeight(
                f"a {type(owner).__name__} holds two 4-bit numbers a byte for its kernel. Use a method on activations, "
                "such as LoRA, IA3 or BottleneckAdapter, and keep it attached."
            )
        if block is not None:
            for dim, size in enumerate(block):
                scale = scale.repeat_interleave(size, dim)
            scale = scale[: linear.out_features, : linear.in_features]
        dense: Tensor = linear.weight.detach().float() * scale
        return dense


class Rows(FineGrained):
    """FbgemmFp8Linear: a scale for each row; its kernel gives no gradients."""

    def differentiable(self, module: nn.Module) -> bool:
        return False

    def dequantize(self, owner: nn.Module) -> Tensor:
        linear: Any = owner
        dense: Tensor = linear.weight.detach().float() * linear.weight_scale.detach().float()
        return dense
