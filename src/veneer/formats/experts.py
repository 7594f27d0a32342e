"""The experts of transformers' mixtures: stacks of matrices, each a parameter of three dimensions of one module.

`gate_up_proj` [experts, 2·inner, width] and `down_proj` [experts, width, inner] are read by whichever product the
config names (grouped, batched or one expert after the other), and no code calls a layer. Some models store them with
the last two dimensions exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from veneer import layers
from veneer.formats.dense import Parameter


class Experts(Parameter):
    """A module that carries the marks of transformers' `use_experts_implementation`."""

    rows = 1

    def weights(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                yield "", name

    def functional(self, module: nn.Module) -> bool:
        return True

    def map(self, module: nn.Module) -> layers.LinearMap:
        return layers.Stack()

    def bias(self, parameter: str) -> str:
        return f"{parameter}_bias"

    def logical(self, owner: nn.Module, tensor: Tensor) -> Tensor:
        return tensor.mT if owner.is_transposed else tensor

    def stored(self, owner: nn.Module, tensor: Tensor) -> Tensor:
        return self.logical(owner, tensor)
