"""What quantized linears share: while something is merged into one, it is a plain linear with a dense weight.

Gradients to x pass a kernel that gives none by the dequantized weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import layers
from veneer.errors import MethodError, NotMergeable, UnreadableWeight
from veneer.formats import Format
from veneer.formats.dense import Linear

_OWN = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_non_persistent_buffers_set"}


class Quantized(Linear):
    """A linear that stores its weight, and nothing else, in few bits."""

    quantized = True

    def now(self, owner: nn.Module) -> Format:
        return Linear() if type(owner) is nn.Linear else self

    def kind(self, owner: nn.Module) -> str:
        """What an error calls such a weight."""
        return type(owner).__name__

    def functional(self, module: nn.Module) -> bool:
        return False

    def map(self, module: nn.Module) -> layers.LinearMap:
        return layers.Matrix()

    def shape(self, owner: nn.Module, parameter: str) -> tuple[int, ...]:
        if parameter != "weight":
            return super().shape(owner, parameter)
        module: Any = owner
        return module.out_features, module.in_features

    def count(self, owner: nn.Module, parameter: str) -> int:
        return torch.Size(self.shape(owner, parameter)).numel()

    def read(self, owner: nn.Module, parameter: str) -> Tensor:
        return self.dequantize(owner) if parameter == "weight" else super().read(owner, parameter)

    def dequantize(self, owner: nn.Module) -> Tensor:
        """The weight as the numbers that its bits stand for."""
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
        bias = _bias(module)
        if bias is None or not bias.requires_grad:
            return passed
        return passed + (bias - bias.detach()).to(y.dtype)  # it is in y already, and y was cut off

    def _dense(self, owner: nn.Module) -> Callable[[torch.dtype], Tensor]:
        return lambda dtype: self.dequantize(owner).to(dtype)

    def write(self, owner: nn.Module, parameter: str, weight: Tensor) -> None:
        if parameter == "weight":
            raise NotMergeable(f"a {self.kind(owner)} stores its weight quantized. Merge with veneer.merge.")
        super().write(owner, parameter, weight)

    def unpack(self, owner: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
        if "forward" in vars(owner):
            raise NotMergeable(
                f"the forward of this {self.kind(owner)} was replaced, as offloading does. Load the whole base on "
                "one device to merge into it."
            )
        out, in_ = self.shape(owner, "weight")
        again, bias = self.packer(owner), _bias(owner)
        plain = nn.Linear(in_, out, bias=False, device="meta")
        plain.weight = nn.Parameter(self.dequantize(owner).to(dtype), requires_grad=False)
        if bias is not None:
            plain.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        become(owner, plain)
        return lambda: become(owner, again(cast(nn.Linear, owner)))

    def packer(self, owner: nn.Module) -> Callable[[nn.Linear], nn.Module]:
        """How to make a module like this one from a plain linear; NotMergeable when called where that is not known."""
        kind = self.kind(owner)

        def pack(plain: nn.Linear) -> nn.Module:
            raise NotMergeable(f"what a {kind} was quantized with cannot be told from it. Leave requantize out.")

        return pack


def become(module: nn.Module, other: nn.Module) -> None:
    """Make a module what another is, class, tensors and attributes; hooks, children and mode stay its own."""
    own = {name: value for name, value in vars(module).items() if name in _OWN}
    vars(module).clear()
    vars(module).update(vars(other) | own)
    module.__class__ = type(other)


def _bias(owner: nn.Module) -> Tensor | None:
    """The bias as this forward reads it, a parameter or not."""
    return vars(owner).get("bias", owner._parameters.get("bias"))


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
