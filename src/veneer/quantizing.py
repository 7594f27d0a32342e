"""A base in four bits, for training adapters on it in a quarter of the memory: in place, while loading, and on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer import places
from veneer.delta import Place
from veneer.errors import AdapterError, FileError, NoSuchPlace, PlaceError
from veneer.formats import dense, experts
from veneer.formats.nf4_experts import STACKS, holder
from veneer.formats.nf4_storage import Holder, finite
from veneer.handle import adapters
from veneer.ops import nf4_kernels
from veneer.seams import anatomy, transformers

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


def quantize(model: nn.Module, method: NF4, where: str | None = None, *, skip: Sequence[str] = ()) -> nn.Module:
    """Store the linears and experts that `where` names in four bits, in place, one after the other; returns the model.

    `where` is read as by `attach`; None means every linear in the blocks and every stack of a mixture's experts. The
    head, embeddings, norms and routers are none of those and stay in their dtype. So do what the model itself keeps in
    float32, such as the last projections of T5's MLPs, and a linear whose weight other code reads (Mamba's `dt_proj`).
    `skip` names modules (globs or `re:` regexes) to leave out. Adapters come afterwards.

    Raises PlaceError where an adapter is attached already, a weight is not finite or its device lacks the kernel that
    was asked for, NoSuchPlace for a `where` or `skip` that names nothing.
    """
    if adapters(model):
        raise PlaceError("The model carries adapters, which were built for its dense weights. Quantize, then attach.")
    found = chosen(model, where, skip)
    for place in found:
        if method.kernel is not None and not place.weight.is_meta:
            nf4_kernels.check(method.kernel, place.weight.device.type)
        if not place.weight.is_meta and not finite(place.weight):
            raise PlaceError(f"{place.path} has weights that are not finite, which no level can stand for. Mend them.")
    for path, names in by_owner(found).items():
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = holder(model.get_submodule(path), names, vars(method))
    transformers.note_quantized(model)
    return model


def load_quantized(
    source: str | Path,
    method: NF4 | None = None,
    where: str | None = None,
    *,
    skip: Sequence[str] = (),
    model_class: Any = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> nn.Module:
    """Load a transformers model and store what `where` names in four bits, each weight as it is read.

    The dense model is never in memory: the peak is that of the 4-bit model and its largest tensor; of experts that a
    file has one by one, it is that of the 4-bit model and twice the largest stack of them. `source` is a folder
    or a Hub id (with `revision`) of safetensors. `method` is NF4() by default, and `where` and `skip` are as in
    `quantize`. What is in NF4 already, by `save_quantized` or by transformers with bitsandbytes, opens with the bytes
    that it has; then `method`, `where` and `skip` are not to be given.

    `model_class` is any class of transformers, by default the one that the config names. `dtype` is that of all that
    stays dense, by default the one the config names. `device` is a device or any `device_map` of transformers.

    Raises FileError or CorruptFile for what cannot be read, PlaceError for weights that are not finite, NoSuchPlace and
    UnreadableModel as `attach` does; a model whose roles cannot be read takes a glob for `where`.
    """
    from veneer.seams import loading

    config = loading.config_of(str(source), revision)
    model_class = model_class or loading.class_of(config)
    options: dict[str, Any] = {"revision": revision, "dtype": dtype or "auto", "device_map": device}
    stored = loading.quantization(config)
    if stored is None:
        method = method or NF4()
        found = by_owner(chosen(loading.without_weights(config, model_class), where, skip))
        return loading.load(str(source), config, model_class, found, vars(method), **options)
    kind = stored.get("bnb_4bit_quant_type") if stored.get("load_in_4bit") else stored.get("quant_method")
    if kind != "nf4":
        raise FileError(f"{source} is quantized already ({kind}), not in NF4. Load it with transformers, then attach.")
    if method is not None or where is not None or skip:
        raise FileError(f"{source} is in NF4 already. Leave method, where and skip out, or load the dense model.")
    return loading.load(str(source), config, model_class, None, {}, **options)


def save_quantized(model: nn.Module, folder: str | Path) -> Path:
    """Write a model with weights in NF4 into a new folder, and return the folder.

    It is transformers' own, with the keys and the `quantization_config` of bitsandbytes: `load_quantized` opens it, and
    so does `from_pretrained` where bitsandbytes is installed and no experts are in NF4. The folder appears when all of
    it is written.

    Raises PlaceError where nothing is in NF4, FileError where the folder exists or the model is not of transformers,
    AdapterError where adapters are attached.
    """
    from veneer.seams import loading

    if not transformers.is_pretrained(model):
        raise FileError(
            f"{type(model).__name__} is no transformers model. Save its state_dict, which has all there is."
        )
    if not any(isinstance(module, Holder) for module in model.modules()):
        raise PlaceError(f"{type(model).__name__} has nothing in NF4. Call veneer.quantize first, or save_pretrained.")
    if adapters(model):
        raise AdapterError("The model carries adapters. Save each with veneer.save, detach it, then save the base.")
    loading.save(model, Path(folder))
    return Path(folder)


def chosen(model: nn.Module, where: str | None, skip: Sequence[str]) -> list[Place]:
    """The dense weights that `where` names and `skip` does not; PlaceError where there is none, or one is shared."""
    found = places.find(model, where, "weight") if where is not None else _usual(model)
    left_out = {place.path for text in skip for place in places.find(model, text, "weight")}
    fixed = transformers.kept_in_float32(model)
    kept = [p for p in found if _fits(p) and not (p.path in left_out or fixed(p.owner_path))]
    if not kept:
        raise PlaceError(
            f"where='{where or 'linear'}' names no dense linear of {type(model).__name__} to quantize. Its weights may "
            "be stored as another kind of module, or be among those that it keeps in float32."
        )
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for place in kept:
        if holders[id(place.weight)] > 1:
            raise PlaceError(f"{place.path} shares its weight with another module. Name it in skip=['{place.path}'].")
    return kept


def by_owner(found: Sequence[Place]) -> Mapping[str, list[str]]:
    """The names of the weights of each module, by its path."""
    owners: dict[str, list[str]] = {}
    for place in found:
        owners.setdefault(place.owner_path, []).append(place.parameter)
    return owners


def _usual(model: nn.Module) -> list[Place]:
    """Every linear in the blocks, and every stack of experts."""
    stacks = [place for place in places.weights(model).values() if type(place.format) is experts.Experts]
    outside = anatomy.read_from_outside(model)
    try:
        linears = places.find(model, "linear", "weight")
        return [*(place for place in linears if place.owner_path not in outside), *stacks]
    except NoSuchPlace:
        if not stacks:
            raise
        return stacks


def _fits(place: Place) -> bool:
    """Whether a weight is stored dense and in a module that can hold it in NF4."""
    if type(place.format) is dense.Linear:
        return not place.functional
    if type(place.format) is not experts.Experts:
        return False
    if place.parameter not in STACKS or vars(place.owner)["_is_expert_parallel"]:
        raise PlaceError(
            f"{place.path} is no stack that can be computed from NF4: experts have {', '.join(STACKS)}, all on one "
            f"device. Name it in skip=['{place.path}']."
        )
    return True
