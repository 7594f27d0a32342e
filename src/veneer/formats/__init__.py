"""How a base weight is stored: its logical shape, reading it dense, writing it back.

A format is found by the qualified names along a module's method resolution order, the most specific first, so that
recognising transformers' Conv1D or a quantizer's linear imports neither library. Where the weight is a tensor subclass
that stands for other numbers, the module says what is computed and the names along the subclass say how it is stored. A
new storage is one file here and one row in `_KNOWN` or `_TENSORS`. Stacks of experts have a class in every model; they
are known by the marks that transformers sets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import NotMergeable
from veneer.layers import LinearMap

_KNOWN = {
    "torch.nn.modules.linear.Linear": "dense.Linear",
    "torch.nn.modules.sparse.Embedding": "dense.Embedding",
    "torch.nn.modules.conv.Conv1d": "dense.Convolution",
    "torch.nn.modules.conv.Conv2d": "dense.Convolution",
    "torch.nn.modules.conv.Conv3d": "dense.Convolution",
    "torch.nn.modules.activation.MultiheadAttention": "attention.MultiheadAttention",
    "torch.nn.modules.transformer.TransformerEncoderLayer": "attention.TransformerEncoderLayer",
    "transformers.pytorch_utils.Conv1D": "dense.Conv1D",
    "veneer.formats.nf4.NF4Linear": "nf4.NF4",
    "veneer.formats.nf4_experts.NF4Experts": "nf4_experts.Experts",
    "bitsandbytes.nn.modules.Linear4bit": "bitsandbytes.Linear4bit",
    "bitsandbytes.nn.modules.Linear8bitLt": "bitsandbytes.Linear8bitLt",
    "hqq.core.quantize.HQQLinear": "hqq.HQQLinear",
    "gptqmodel.nn_modules.qlinear.BaseQuantLinear": "gptq.GPTQModel",
    "transformers.integrations.finegrained_fp8.FP8Linear": "fp8.FineGrained",
    "transformers.integrations.fbgemm_fp8.FbgemmFp8Linear": "fp8.Rows",
    "transformers.integrations.mxfp4.Mxfp4GptOssExperts": "mxfp4.Experts",
}
_TENSORS = {"torchao.utils.TorchAOBaseTensor": "torchao"}
"""Files by the class of a weight; each names its formats as `dense.py` names those of the same modules."""
_EXPERTS = {"is_transposed", "is_concatenated", "has_gate", "has_bias"}


class Format(ABC):
    """One way to store the weight of one kind of module. Formats hold no state.

    `rows` is the dimension of the logical shape that holds a layer's outputs, which spans count. A `quantized` weight
    stands for other numbers than those that are stored, so that it can be neither trained nor changed in place. One
    that is not `readable` is laid out for its kernel alone: `read` raises UnreadableWeight.
    """

    rows: ClassVar[int] = 0
    quantized: ClassVar[bool] = False
    readable: ClassVar[bool] = True

    def now(self, owner: nn.Module) -> Format:
        """The format as which the weight is stored now: a quantized one is dense while something is merged into it."""
        return self

    def prepare(self, module: nn.Module) -> None:
        """Make sure that gradients go through the module, adapted or not; PlaceError where it is too late for that."""

    def weights(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        """(path of the owner below the module, parameter name) of each weight that a method can act on."""
        yield "", "weight"

    def functional(self, module: nn.Module) -> bool:
        """Whether the module's forward does more with its weights than the map, so that they must change where read."""
        return False

    def tensor(self, owner: nn.Module, parameter: str) -> Tensor | None:
        """What a weight is stored in, a parameter of that name unless the class has another; None where it has none."""
        return owner._parameters.get(parameter)

    def differentiable(self, module: nn.Module) -> bool:
        """Whether the module's own forward gives gradients to its input."""
        return True

    def through(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The module's own answer y to x, with the gradients to x that its own forward does not give."""
        return y

    @abstractmethod
    def map(self, module: nn.Module) -> LinearMap:
        """What the module computes with its weight; MethodError for a variant that has no such form."""

    def shape(self, owner: nn.Module, parameter: str) -> tuple[int, ...]:
        """The logical shape [out, in, *kernel]."""
        return tuple(self.read(owner, parameter).shape)

    def logical(self, owner: nn.Module, tensor: Tensor) -> Tensor:
        """A tensor that is laid out as the stored weight, in the logical shape; shares memory with it."""
        return tensor

    def stored(self, owner: nn.Module, tensor: Tensor) -> Tensor:
        """The reverse of `logical`."""
        return tensor

    def bias(self, parameter: str) -> str:
        """What the bias beside a weight is called, where there is one."""
        return parameter.replace("weight", "bias")

    def count(self, owner: nn.Module, parameter: str) -> int:
        """How many elements the stored parameter means, whatever it is packed into."""
        tensor = owner._parameters[parameter]
        return 0 if tensor is None else tensor.numel()

    @abstractmethod
    def read(self, owner: nn.Module, parameter: str) -> Tensor:
        """The weight as a dense tensor in its logical shape; may share memory with the stored one."""

    def multiply(self, owner: nn.Module, parameter: str, x: Tensor) -> Tensor:
        """x·Wᵀ without the bias, all but W's first dimension taken as one; gradients flow to x."""
        return F.linear(x, self.read(owner, parameter).flatten(1).to(x.dtype))

    def changed(self, owner: nn.Module, parameter: str, delta: Any, outputs: Tensor | None, pair: Any) -> Any:
        """What the owner's forward has to find under the parameter's name to compute with delta(weight).

        `outputs` numbers those that the delta changes, None all; `pair` is (A, B, s) where it adds s·B·A to whatever
        it is given. What earlier deltas left there is changed further.
        """
        now: Any = vars(owner).get(parameter, owner._parameters[parameter])
        weight = self.logical(owner, now)
        if outputs is None:
            weight = delta(weight)
        else:
            weight = weight.index_copy(self.rows, outputs, delta(weight.index_select(self.rows, outputs)))
        return self.stored(owner, weight)

    def stand_in(self, owner: nn.Module, weights: Mapping[str, Tensor]) -> Callable[..., Any]:
        """A forward for a probe, with dense tensors in the place of a quantized module's weights, by their names."""
        return partial(F.linear, weight=weights["weight"])

    @abstractmethod
    def write(self, owner: nn.Module, parameter: str, weight: Tensor) -> None:
        """Replace the stored values in place; NotMergeable where the storage cannot take them."""

    def unpack(self, owner: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
        """Make a quantized module one that holds its weight dense; what is returned quantizes it again, as it was.

        Raises NotMergeable where there is no reading the weight.
        """
        raise NotMergeable(f"a {type(owner).__name__} has nothing to unpack.")


def of(module: nn.Module) -> Format | None:
    """The format of a module's weight, or None where the module is no linear map that Veneer knows."""
    name = _first(type(module), _KNOWN)
    if name is not None:
        file, attribute = name.split(".")
        file = _first(type(module._parameters.get("weight")), _TENSORS) or file
        found: type[Format] | None = vars(import_module(f"{__name__}.{file}")).get(attribute)
        return found() if found else None
    if vars(module).keys() >= _EXPERTS:
        from veneer.formats.experts import Experts

        return Experts()
    return None


def _first(cls: type, table: dict[str, str]) -> str | None:
    """What a table says of the first class along the method resolution order that it knows."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
    return next((table[name] for name in names if name in table), None)
