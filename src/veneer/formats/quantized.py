"""What quantized linears share: a logical shape beside the packed one, and gradients to x past a kernel without any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import layers
from veneer.errors import MethodError, NotMergeable, UnreadableWeight
from veneer.formats.dense import Parameter


class Quantized(Parameter):
    """A linear layer that multiplies by numbers it stores in few bits."""

    quantized: ClassVar[bool] = True

    def shape(self, owner: nn.Module, parameter: str) -> tuple[int, ...]:
        module: Any = owner
        return (module.out_features, module.in_features) if parameter == "weight" else super().shape(owner, parameter)

    def kind(self, owner: nn.Module) -> str:
        """What an error calls such a weight."""
        return type(owner).__name__

    def map(self, module: nn.Module) -> layers.LinearMap:
        return layers.Matrix()

    def count(self, owner: nn.Module, parameter: str) -> int:
        if parameter != "weight":
            return super().count(owner, parameter)
        return torch.Size(self.shape(owner, parameter)).numel()

    def read(self, owner: nn.Module, parameter: str) -> Tensor:
        return self.dense(owner) if parameter == "weight" else super().read(owner, parameter)

    def dense(self, owner: nn.Module) -> Tensor:
        """The numbers that the stored weight stands for, in its logical shape."""
        raise UnreadableWeight(
            f"a {self.kind(owner)} lays its weight out for its kernel, and the numbers cannot be read back. Use a "
            "method on activations, such as LoRA, IA3 or BottleneckAdapter, and keep it attached."
        )

    def multiply(self, owner: nn.Module, parameter: str, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, None, self._dense(owner))  # type: ignore[no-untyped-call]
        return product

    def through(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not self.readable:
            raise MethodError(
                f"a {self.kind(module)} gives no gradient to its input, so that what trains below it would train "
                "wrongly. Attach above it, train on a base in 16 bits, or run without gradients."
            )
        passed: Tensor = _Product.apply(x, y.detach(), self._dense(module))  # type: ignore[no-untyped-call]
        bias = vars(module).get("bias", module._parameters.get("bias"))
        if bias is None or not bias.requires_grad:
            return passed
        return passed + (bias - bias.detach()).to(y.dtype)  # it is in y already, and y was cut off

    def _dense(self, owner: nn.Module) -> Callable[[torch.dtype], Tensor]:
        return lambda dtype: self.read(owner, "weight").to(dtype)

    def write(self, owner: nn.Module, parameter: str, weight: Tensor) -> None:
        if parameter != "weight":
            return super().write(owner, parameter, weight)
        raise NotMergeable(
            f"a {self.kind(owner)} stores its weight quantized, and rounding it again would lose most of a small "
            "change. Load the base in bfloat16 and merge there, or keep the adapter attached."
        )


class _Product(torch.autograd.Function):
    """x·Wᵀ, or an answer y that stands for it, with W dense only while it is multiplied by, and never saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, dense: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.dense = dense
        ctx.dtype = x.dtype
        return F.linear(x, dense(x.dtype)) if y is None else y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (gradient @ ctx.dense(gradient.dtype)).to(ctx.dtype), None, None


def differentiable(run: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether gradients flow from run(x) to x, tried once; a kernel that does not run at all will say so itself."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        try:
            y = run(x)
        except Exception:
            return True
        if not y.requires_grad:
            return False
        try:
            torch.autograd.grad(y.sum(), x)
        except RuntimeError:
            return False
    return True
