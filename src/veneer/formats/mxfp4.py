"""gpt-oss' experts in MXFP4: stacks of 4-bit numbers, laid out for a kernel that gives no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import nn

from veneer import layers
from veneer.errors import MethodError
from veneer.formats.quantized import Quantized


class Experts(Quantized):
    """transformers' Mxfp4GptOssExperts: `gate_up_proj` and `down_proj`, two numbers a byte."""

    rows = 1
    readable: ClassVar[bool] = False

    def weights(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        yield "", "gate_up_proj"
        yield "", "down_proj"

    def functional(self, module: nn.Module) -> bool:
        return True

    def map(self, module: nn.Module) -> layers.LinearMap:
        raise MethodError(
            "MXFP4 experts are laid out for their kernel, and no layer is called. Load the model with "
            "Mxfp4Config(dequantize=True), or name the attention."
        )

    def shape(self, owner: nn.Module, parameter: str) -> tuple[int, ...]:
        """[experts, out, in] of a stack before its kernel swizzles it."""
        tensor = owner._parameters[parameter]
        assert tensor is not None
        packed = parameter in ("gate_up_proj", "down_proj")
        return torch.Size([*tensor.shape[:-1], 2 * tensor.shape[-1]]) if packed else tuple(tensor.shape)

    def count(self, owner: nn.Module, parameter: str) -> int:
        return torch.Size(self.shape(owner, parameter)).numel()

    def differentiable(self, module: nn.Module) -> bool:
        return False
