"""torchao's tensor subclasses, whichever they are: the layer stays nn.Linear or nn.Embedding, its weight is quantized.

Weight-only int8 and float8, and the intx layouts, give gradients to x. int4 in its CPU layout and layouts that quantize
activations give none, which trying a layer once shows; they pass x's gradient on by the dequantized weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import layers
from veneer.errors import MethodError
from veneer.formats import Format, dense, of
from veneer.formats.quantized import Quantized, differentiable


class Linear(Quantized):
    """nn.Linear with a torchao weight [out, in]."""

    def now(self, owner: nn.Module) -> Format:
        return self if type(of(owner)) is Linear else dense.Linear()

    def map(self, module: nn.Module) -> layers.LinearMap:
        if type(module).forward is not nn.Linear.forward:
            raise MethodError(
                f"a {type(module).__name__} reads its weight in code of its own, and torchao stores it quantized. "
                "Leave it out of `where`, or leave it dense."
            )
        return layers.Matrix()

    def kind(self, owner: nn.Module) -> str:
        return type(owner._parameters["weight"]).__name__

    def dequantize(self, owner: nn.Module) -> Tensor:
        weight: Any = owner._parameters["weight"]
        try:
            read: Tensor = weight.dequantize()
        except NotImplementedError:  # int4 on a CPU has a product only: with the unit vectors it is the weight
            one = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
            read = F.linear(one, weight.detach()).T
        return read

    def differentiable(self, module: nn.Module) -> bool:
        weight: Any = module._parameters["weight"]
        one = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
        return one.is_meta or differentiable(lambda x: F.linear(x, weight), one)


class Embedding(dense.Embedding):
    """nn.Embedding with a torchao weight [vocabulary, width]."""

    quantized = True

    def shape(self, owner: nn.Module, parameter: str) -> tuple[int, ...]:
        weight: Any = owner._parameters[parameter]
        return tuple(reversed(weight.shape))

    def read(self, owner: nn.Module, parameter: str) -> Tensor:
        weight: Any = owner._parameters[parameter]
        return self.logical(owner, weight.dequantize())

    def write(self, owner: nn.Module, parameter: str, weight: Tensor) -> None:
        Linear().write(owner, parameter, weight)
