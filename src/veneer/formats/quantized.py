"""What quantized linears share: while something is merged into one, it is a plain linear with a dense weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from veneer import layers
from veneer.errors import NotMergeable
from veneer.formats import Format
from veneer.formats.dense import Linear

_OWN = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_non_persistent_buffers_set"}


class Quantized(Linear):
    """A linear that stores its weight, and nothing else, in few bits."""

    quantized = True

    def now(self, owner: nn.Module) -> Format:
        return Linear() if type(owner) is nn.Linear else self

    def functional(self, module: nn.Module) -> bool:
        return False

    def map(self, module: nn.Module) -> layers.LinearMap:
        return layers.Matrix()

    def shape(self, owner: nn.Module, parameter: str) -> tuple[int, ...]:
        if parameter != "weight":
            return super().shape(owner, parameter)
        assert isinstance(owner, nn.Linear)
        return owner.out_features, owner.in_features

    def count(self, owner: nn.Module, parameter: str) -> int:
        return torch.Size(self.shape(owner, parameter)).numel()

    def read(self, owner: nn.Module, parameter: str) -> Tensor:
        return self.dequantize(owner) if parameter == "weight" else super().read(owner, parameter)

    @abstractmethod
    def dequantize(self, owner: nn.Module) -> Tensor:
        """The weight as the numbers that its bits stand for."""

    def write(self, owner: nn.Module, parameter: str, weight: Tensor) -> None:
        if parameter == "weight":
            raise NotMergeable(f"a {type(owner).__name__} stores its weight quantized. Merge with veneer.merge.")
        super().write(owner, parameter, weight)

    def unpack(self, owner: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
        if "forward" in vars(owner):
            raise NotMergeable(
                f"the forward of this {type(owner).__name__} was replaced, as offloading does. Load the whole base on "
                "one device to merge into it."
            )
        assert isinstance(owner, nn.Linear)
        again = self.packer(owner)
        plain = nn.Linear(owner.in_features, owner.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.dequantize(owner).to(dtype), requires_grad=False)
        plain.bias = owner.bias
        become(owner, plain)
        return lambda: become(owner, again(owner))

    @abstractmethod
    def packer(self, owner: nn.Module) -> Callable[[nn.Linear], nn.Module]:
        """How to make a module like this one from a plain linear."""


def become(module: nn.Module, other: nn.Module) -> None:
    """Make a module what another is, class, tensors and attributes; hooks, children and mode stay its own."""
    own = {name: value for name, value in vars(module).items() if name in _OWN}
    vars(module).clear()
    vars(module).update(vars(other) | own)
    module.__class__ = type(other)
