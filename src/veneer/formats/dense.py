"""Weights stored as one plain tensor, as they are (Linear, Conv) or transposed (Conv1D, Embedding)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer import layers
from veneer.errors import MethodError
from veneer.formats import Format


class Parameter(Format):
    """Any parameter, in the shape it has."""

    def map(self, module: nn.Module) -> layers.LinearMap:
        raise MethodError(f"{type(module).__name__} is no linear map; only methods that train parameters whole fit it.")

    def read(self, owner: nn.Module, parameter: str) -> Tensor:
        tensor = owner._parameters[parameter]
        assert tensor is not None
        return self.logical(owner, tensor.detach())

    @torch.no_grad()
    def write(self, owner: nn.Module, parameter: str, weight: Tensor) -> None:
        tensor = owner._parameters[parameter]
        assert tensor is not None
        tensor.copy_(self.stored(owner, weight))


class Linear(Parameter):
    """nn.Linear and its subclasses: weight [out, in]."""

    def functional(self, module: nn.Module) -> bool:
        return type(module).forward is not nn.Linear.forward

    def map(self, module: nn.Module) -> layers.LinearMap:
        return layers.Matrix()


class _Transposed(Parameter):
    """A two-dimensional weight stored as [in, out]."""

    def logical(self, owner: nn.Module, tensor: Tensor) -> Tensor:
        return tensor.T

    def stored(self, owner: nn.Module, tensor: Tensor) -> Tensor:
        return tensor.T


class Conv1D(_Transposed):
    """transformers' Conv1D (GPT-2): weight [in, out]."""

    def map(self, module: nn.Module) -> layers.LinearMap:
        return layers.Matrix()


class Embedding(_Transposed):
    """nn.Embedding: weight [vocabulary, width], logically [width, vocabulary]."""

    def map(self, module: nn.Module) -> layers.LinearMap:
        assert isinstance(module, nn.Embedding)
        if type(module).forward is not nn.Embedding.forward:
            raise MethodError(
                f"{type(module).__name__} computes more than a lookup (often a scale), which a change beside it "
                "would miss. Leave it out of `where`, or train it whole with also_train."
            )
        if module.max_norm is not None:
            raise MethodError(
                "an Embedding with max_norm rewrites its weight in the forward pass. Leave it out of `where`, or set "
                "max_norm=None."
            )
        return layers.Lookup()


class Convolution(Parameter):
    """nn.Conv1d, Conv2d and Conv3d: weight [out, in, *kernel]."""

    def functional(self, module: nn.Module) -> bool:
        return type(module).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def map(self, module: nn.Module) -> layers.LinearMap:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if module.groups > 1:
            raise MethodError(
                f"a {type(module).__name__} with groups={module.groups} has a block-diagonal weight, of which a low-"
                "rank product is no change. Leave it out of `where`, or train it whole with also_train."
            )
        return layers.Convolution(
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            padding_mode=module.padding_mode,
            edges=tuple(module._reversed_padding_repeated_twice),
        )
