"""Veneer's own NF4 linear: four bits a weight, with bitsandbytes' keys in its checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from veneer.formats.nf4_storage import Holder, pack
from veneer.formats.quantized import Quantized
from veneer.ops import nf4_kernels
from veneer.ops.nf4 import Packed


class NF4Linear(Holder, nn.Linear):
    """y = x·Wᵀ + b with a frozen W in NF4, which is dense only while it is multiplied by; b stays as it is."""

    def __init__(self, linear: nn.Linear, block_size: int, double_quant: bool, kernel: str | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kernel, self.facts = kernel, {}
        self.hold("weight", pack(linear.weight, block_size, double_quant), linear.weight.dtype)
        self.bias = linear.bias
        self.train(linear.training)

    @property
    def packed(self) -> Packed:
        """The stored weight."""
        return self.held("weight")

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as the numbers that its bits stand for, in `dtype` or that of the weight it was made from."""
        return self.numbers("weight", dtype)

    def forward(self, input: Tensor) -> Tensor:
        y = nf4_kernels.multiply(input, self.packed, self.kernel)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        packed, kernel = self.packed, self.kernel or nf4_kernels.chosen(self.weight.device.type)
        return f"{super().extra_repr()}, block_size={packed.block_size}, bits={packed.bits:.3f}, kernel={kernel}"


class NF4(Quantized):
    """The format of `NF4Linear`."""

    def dequantize(self, owner: nn.Module) -> Tensor:
        return _linear(owner).dense()

    def multiply(self, owner: nn.Module, parameter: str, x: Tensor) -> Tensor:
        return nf4_kernels.multiply(x, _linear(owner).packed, _linear(owner).kernel)

    def packer(self, owner: nn.Module) -> Callable[[nn.Linear], nn.Module]:
        facts, kernel = _linear(owner).facts["weight"], _linear(owner).kernel
        return lambda plain: NF4Linear(plain, facts.block_size, facts.double_quant, kernel)


def _linear(owner: nn.Module) -> NF4Linear:
    assert isinstance(owner, NF4Linear)
    return owner
