"""transformers' own loader, which hands each weight over as it comes, to be packed in NF4 and let go of.

`from_pretrained` renames and merges a checkpoint's tensors, ties, initialises and places them for every architecture;
a quantizer registered with it sees each weight after that and before the next one is read. A checkpoint that is in NF4
already is read the same way: its statistics are gathered by bitsandbytes' keys.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, apply_converters
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from veneer.errors import CorruptFile, FileError, PlaceError, VeneerError, WrongModel, listed
from veneer.formats import experts, nf4_storage, of
from veneer.formats.nf4_experts import STACKS, NF4Experts, holder
from veneer.formats.nf4_storage import Holder
from veneer.ops.nf4 import Packed
from veneer.seams.transformers import head, note_quantized, save_language_model

_NAME = "veneer_nf4"
_FP4 = ".quant_state.bitsandbytes__fp4"
_SOURCES = {
    "weight": {f"weight{key}": key for key in (*nf4_storage.KEYS, _FP4)},
    **{f".{name}": {rf"\.{name}{re.escape(key)}$": key for key in nf4_storage.KEYS} for name in STACKS},
}
"""By what a weight is called in a model: how its tensors are found in a checkpoint, each with its key there."""


def config_of(source: str, revision: str | None) -> PreTrainedConfig:
    """The config of a folder or Hub id; FileError where there is none."""
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise FileError(f"{source} holds no transformers model: {_first_line(error)}") from None
    return found


def quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What a config says of how its checkpoint is quantized; None for a dense one."""
    found: Any = vars(config).get("quantization_config")
    return found if found is None or isinstance(found, dict) else dict(found.to_dict())


def class_of(config: PreTrainedConfig) -> Any:
    """The class that a config names, or the bare model."""
    return getattr(transformers, (config.architectures or [""])[0], None) or AutoModel


def base_of(source: str, class_name: str) -> nn.Module:
    """The model of a folder or Hub id in the class that an adapter was made on, in the dtype it is stored in.

    An empty class name means the class that its config names; FileError where it cannot be loaded.
    """
    config = config_of(source, None)
    model_class = getattr(transformers, class_name, None) or class_of(config)
    try:
        loaded: nn.Module = model_class.from_pretrained(source, dtype="auto")
    except (OSError, ValueError) as error:
        raise FileError(f"{source} cannot be loaded as {model_class.__name__}: {_first_line(error)}") from None
    return loaded


def without_weights(config: PreTrainedConfig, model_class: Any) -> nn.Module:
    """The model on the meta device."""
    build = model_class.from_config if hasattr(model_class, "from_config") else model_class
    with torch.device("meta"):
        built: nn.Module = build(copy.deepcopy(config))
    return built


@register_quantization_config(_NAME)
@dataclass
class _Config(QuantizationConfigMixin):
    """Which weights of which modules to pack while loading, and how; nothing where the checkpoint says so itself."""

    quant_method: Any = _NAME
    paths: Mapping[str, Sequence[str]] = field(default_factory=dict)
    packing: Mapping[str, Any] = field(default_factory=dict)


class _Stop(BaseException):
    """Ends the loading at once; transformers gathers every Exception and goes on."""

    def __init__(self, error: VeneerError) -> None:
        self.error = error


class _Pack(ConversionOps):
    """A dense weight, as it is wanted in the model, into four bits."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        return {name: self._packed(model, name, _only(tensor)) for name, tensor in input_dict.items()}

    def _packed(self, model: nn.Module, name: str, weight: Tensor) -> Tensor:
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module, Holder) or parameter not in module.facts:
            return weight
        facts = module.facts[parameter]
        if tuple(weight.shape) != facts.shape:
            raise _Stop(WrongModel(f"{name} is {list(weight.shape)} in the checkpoint, not {list(facts.shape)}."))
        if not nf4_storage.finite(weight):
            called = name.removesuffix(".weight")
            raise _Stop(
                PlaceError(
                    f"{called} has weights that are not finite, which no level can stand for. Mend the checkpoint."
                )
            )
        packed = nf4_storage.pack(weight, facts.block_size, facts.double_quant)
        return self.hf_quantizer.keep(path, parameter, packed, weight.dtype)


class _Read(ConversionOps):
    """A weight that the checkpoint has in NF4, whose module becomes a holder; others pass as they are."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        (target,) = target_patterns
        tensors = {_SOURCES[target][source]: _only(tensor) for source, tensor in input_dict.items()}
        if len(tensors) == 1 and all(tensor.is_floating_point() for tensor in tensors.values()):
            return {target: next(iter(tensors.values()))}
        path, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(path)
        try:
            packed, stored = nf4_storage.unpack(tensors, full_layer_name)
            dense = module._parameters.get(name)
            if not isinstance(module, nn.Linear | NF4Experts) and type(of(module)) is not experts.Experts:
                raise WrongModel(f"{path} is a {type(module).__name__} in the model and NF4 in the checkpoint.")
            if dense is None or packed.shape != tuple(dense.shape):
                shape = None if dense is None else list(dense.shape)
                raise WrongModel(f"{full_layer_name} is {list(packed.shape)} in the checkpoint, not {shape}.")
        except VeneerError as error:
            raise _Stop(error) from None
        if isinstance(module, NF4Experts):
            module.pack(name, packed.block_size, packed.outer is not None)
        else:
            above, _, own = path.rpartition(".")
            packing = {"block_size": packed.block_size, "double_quant": packed.outer is not None}
            model.get_submodule(above)._modules[own] = module = holder(module, [name], packing)
        module.wait()
        return {target: self.hf_quantizer.keep(path, name, packed, stored)}


@register_quantizer(_NAME)
class _Quantizer(HfQuantizer):
    """The magnitudes wait here until all is loaded: transformers empties every buffer that is in no checkpoint."""

    serialized_names = {target: list(sources) for target, sources in _SOURCES.items()}  # noqa: RUF012 - as in the base
    quantization_config: _Config
    waiting: dict[tuple[str, str], tuple[Packed, torch.dtype]]

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.waiting = {}
        for path, names in self.quantization_config.paths.items():
            module = holder(model.get_submodule(path), names, self.quantization_config.packing)
            module.wait()
            vars(module)["_is_hf_initialized"] = True  # else what the checkpoint lacks would be drawn at random
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent)._modules[name] = module

    def __deepcopy__(self, memo: Any) -> _Quantizer:
        """A conversion is copied for each tensor, with its quantizer, which has to stay this one."""
        return self

    def keep(self, path: str, name: str, packed: Packed, stored: torch.dtype) -> Tensor:
        """Remember a weight's magnitudes; returns its bytes, which transformers puts in their place."""
        self.waiting[path, name] = (packed, stored)
        return packed.data

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for (path, name), (packed, stored) in self.waiting.items():
            model.get_submodule(path).hold(name, packed, stored)
        self.waiting = {}
        holders = [(path, module) for path, module in model.named_modules() if isinstance(module, Holder)]
        lost = [f"{path}.{name}" for path, module in holders for name in module.waiting]
        if lost:
            raise CorruptFile(f"The checkpoint has no {listed(lost)}. Restore it from where it came from.")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        module = model.get_submodule(path)
        return isinstance(module, Holder) and name in module.facts

    @property
    def quantized_element_size(self) -> float:
        return 4.127 / 8

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Read}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def load(
    source: str,
    config: PreTrainedConfig,
    model_class: Any,
    paths: Mapping[str, Sequence[str]] | None,
    packing: Mapping[str, Any],
    *,
    revision: str | None,
    dtype: torch.dtype | str,
    device_map: Any,
) -> nn.Module:
    """A model whose weights are packed as they are read: for each path of a module the names of those of it to pack.

    None: the checkpoint is in NF4 already. `packing` is how: `block_size`, `double_quant` and `kernel`.
    """
    config = copy.deepcopy(config)
    stored = quantization(config) or {}
    wanted: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "revision": revision, "use_safetensors": True}
    if paths is None:
        config.quantization_config = {"quant_method": _NAME}
    else:
        wanted["quantization_config"] = _Config(paths=paths, packing=packing)
    try:
        with _reading():
            model, report = model_class.from_pretrained(source, config=config, output_loading_info=True, **wanted)
    except VeneerError as error:
        raise type(error)(f"{source}: {error}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise FileError(f"{source} cannot be loaded as {model_class.__name__}: {_first_line(error)}") from None
    if paths is None:
        _refuse_lost(source, model, report["missing_keys"], stored.get("llm_int8_skip_modules") or ())
        if isinstance(dtype, torch.dtype):
            model.to(dtype)
    _take_marks_off(model)
    return model  # type: ignore[no-any-return]


def pack_while_loading(
    run: Callable[[Any], tuple[Any, Any]], paths: Mapping[str, Sequence[str]], packing: Mapping[str, Any]
) -> tuple[Any, Any]:
    """What `run(quantization_config)` loads by a `from_pretrained`, and its report; `paths`, `packing` as in `load`."""
    with _reading():
        model, report = run(_Config(paths=paths, packing=packing))
    _take_marks_off(model)
    return model, report


def _take_marks_off(model: Any) -> None:
    """A Trainer refuses what calls itself quantized and is not PEFT's."""
    del model.hf_quantizer, model.is_quantized, model.quantization_method
    model._weight_conversions = [c for c in model._weight_conversions if not _reads(c)]
    note_quantized(model)


def save(model: Any, folder: Path, source: str | None = None) -> None:
    """Write a model in NF4, and the tokenizer of its source, into a folder that appears when it is whole."""
    note_quantized(model)
    save_language_model(model, source, folder, as_read=not _fused_in_files(model))


def stored_bits(folder: Path) -> tuple[int, float] | None:
    """(weights in NF4, bits that each takes) of a folder's safetensors; None where it has none in NF4."""
    weights = size = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            for name in (key.removesuffix(nf4_storage.STATE) for key in keys if key.endswith(nf4_storage.STATE)):
                tensors = {k: file.get_tensor(name + k) for k in nf4_storage.KEYS if name + k in keys}
                packed, _ = nf4_storage.unpack(tensors, name)
                weights += math.prod(packed.shape)
                size += packed.size
    return (weights, 8 * size / weights) if weights else None


def _fused_in_files(model: Any) -> bool:
    """Whether the model's usual files join or cut weights that are packed here, which packed bytes do not allow."""
    conversions = vars(model).get("_weight_conversions")
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    converters: Any = [c.reverse_transform() for c in conversions if isinstance(c, WeightConverter)]
    holders = [(path, module) for path, module in model.named_modules() if isinstance(module, Holder)]
    packed = [f"{path}.{name}" for path, module in holders for name in module.facts]
    return any(apply_converters(key, converters)[1] is not None for key in packed)


def _refuse_lost(source: str, model: nn.Module, missing: Sequence[str], dense: Sequence[str]) -> None:
    """Refuse a 4-bit checkpoint that lacks a weight which it does not call dense: transformers draws it at random."""
    lost = []
    for key in sorted(missing):
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        linear = name == "weight" and type(module) is nn.Linear and module is not head(model)
        if (linear and path not in dense) or (name in STACKS and isinstance(of(module), experts.Experts)):
            lost.append(key)
    if lost:
        raise CorruptFile(f"{source} has no {listed(lost)}. Restore it from where it came from.")


def _reads(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and any(type(op) is _Read for op in conversion.operations)


@contextmanager
def _reading() -> Iterator[None]:
    """Within, checkpoints are read, not mapped: a mapped file's pages stay in the process until it is closed. What ends
    a loading at once comes out as the error that it is."""
    names = vars(modeling_utils)
    original = names["safe_open"]
    names["safe_open"] = lambda *args, **options: original(*args, **{**options, "backend": "pread"})
    try:
        yield
    except _Stop as stop:
        raise stop.error from None
    finally:
        names["safe_open"] = original


def _only(tensor: Any) -> Tensor:
    found: Tensor = tensor[0] if isinstance(tensor, list) else tensor
    return found


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
