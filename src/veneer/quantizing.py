"""quantize: the linears of a model in four bits, for training adapters on it in a quarter of the memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from veneer import places
from veneer.errors import PlaceError
from veneer.formats import dense
from veneer.formats.nf4 import NF4Linear
from veneer.handle import adapters
from veneer.ops import nf4_kernels

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class NF4:
    """Four-bit NormalFloat: 16 levels a normal distribution fills evenly, one magnitude a block of weights.

    `block_size` is one of 32, 64, ... 4096; with `double_quant` the magnitudes are stored in 8 bits themselves, which
    makes 4.127 bits a weight at a block size of 64 (4.5 without). `kernel` names what makes a weight dense for each
    product: `c` on a CPU, `bitsandbytes`, `triton` on CUDA, `table`, `reference`; None is the fastest there is, which a
    printed model names. One that is named runs or raises PlaceError, and never gives way to another.

    Paper: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, arXiv:2305.14314.
    """

    block_size: int = 64
    double_quant: bool = True
    kernel: str | None = None

    def __post_init__(self) -> None:
        """Check the block size and the kernel's name."""
        if self.block_size not in BLOCKS:
            raise PlaceError(f"NF4(block_size={self.block_size}): choose one of {', '.join(map(str, BLOCKS))}.")
        if self.kernel is not None:
            nf4_kernels.named(self.kernel)


def quantize(model: nn.Module, method: NF4, where: str = "linear", *, skip: Sequence[str] = ()) -> nn.Module:
    """Store the linears that `where` names in four bits, in place, one after the other; returns the model.

    `where` is read as by `attach`; its default leaves out the head, embeddings and norms, which stay in their dtype.
    `skip` names modules (globs or `re:` regexes) to leave out, such as a router. Adapters come afterwards.

    Raises PlaceError where an adapter is attached already, a weight is not finite or its device lacks the kernel that
    was asked for, NoSuchPlace for a `where` or `skip` that names nothing.
    """
    if adapters(model):
        raise PlaceError("The model carries adapters, which were built for its dense weights. Quantize, then attach.")
    found = [place for place in places.find(model, where, "weight") if type(place.format) is dense.Linear]
    left_out = {place.path for text in skip for place in places.find(model, text, "weight")}
    chosen = [place for place in found if place.path not in left_out and not place.functional]
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for place in chosen:
        if method.kernel is not None and not place.weight.is_meta:
            nf4_kernels.check(method.kernel, place.weight.device.type)
        if not place.weight.is_meta and not torch.isfinite(place.weight).all():
            raise PlaceError(f"{place.path} has weights that are not finite, which no level can stand for. Mend them.")
        if holders[id(place.weight)] > 1:
            raise PlaceError(f"{place.path} shares its weight with another module. Name it in skip=['{place.path}'].")
    for place in chosen:
        parent, _, name = place.owner_path.rpartition(".")
        assert isinstance(place.owner, nn.Linear)
        quantized = NF4Linear(place.owner, method.block_size, method.double_quant, method.kernel)
        model.get_submodule(parent)._modules[name] = quantized
    return model
