"""GPTQ and AWQ as gptqmodel loads them: a class for each kernel, with a layout of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.formats.quantized import Quantized, differentiable


class GPTQModel(Quantized):
    """Any of gptqmodel's linears: `qweight` and what belongs to it are buffers; only the layer itself multiplies."""

    readable: ClassVar[bool] = False

    def tensor(self, owner: nn.Module, parameter: str) -> Tensor | None:
        return {**owner._parameters, **owner._buffers}.get("qweight" if parameter == "weight" else parameter)

    def multiply(self, owner: nn.Module, parameter: str, x: Tensor) -> Tensor:
        """As the layer itself multiplies, less its bias."""
        product: Tensor = type(owner).forward(owner, x)
        bias = self.tensor(owner, "bias")
        product = product if bias is None else product - bias
        lost = torch.is_grad_enabled() and x.requires_grad and not product.requires_grad
        return self.through(owner, x, product) if lost else product

    def differentiable(self, module: nn.Module) -> bool:
        linear: Any = module
        scales = module._buffers["scales"]
        assert scales is not None
        one = torch.ones(1, linear.in_features, dtype=scales.dtype, device=scales.device)
        return one.is_meta or differentiable(lambda x: type(linear).forward(linear, x), one)
