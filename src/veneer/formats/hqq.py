"""HQQ's linear, whose packed weight is called `W_q`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.formats.quantized import Quantized, differentiable


class HQQLinear(Quantized):
    """Integers of 1 to 8 bits with a scale and a zero a group; gradients as its chosen backend gives them."""

    def tensor(self, owner: nn.Module, parameter: str) -> Tensor | None:
        return owner._parameters.get("W_q" if parameter == "weight" else parameter)

    def dequantize(self, owner: nn.Module) -> Tensor:
        linear: Any = owner
        dense: Tensor = linear.dequantize()
        return dense

    def differentiable(self, module: nn.Module) -> bool:
        linear: Any = module
        one = torch.ones(1, linear.in_features, dtype=linear.compute_dtype, device=linear.W_q.device)
        return one.is_meta or differentiable(lambda x: type(linear).forward(linear, x), one)
