"""What a PEFT folder of a LORA means: from its config and its keys to methods and places."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from veneer import places
from veneer.errors import CorruptFile, FileError, listed
from veneer.interop.peft.common import PREFIX, Entry, names, refuse_incomplete, refuse_unsaved, regex, whole_path
from veneer.methods import DoRA, FullFineTuning, LoRA

# Options that only say where the adapter came from, or that the resolved places already contain.
_HARMLESS = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "task_type",
        "inference_mode",
        "peft_type",
    ),
    *("init_lora_weights", "megatron_core", "qalora_group_size", "fan_in_fan_out", "corda_config", "eva_config"),
    *("lora_ga_config", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "rank_pattern", "alpha_pattern"),
    *("use_dora", "target_modules", "target_parameters", "modules_to_save", "exclude_modules"),
    *("layers_to_transform", "layers_pattern"),
}


def from_config(model: nn.Module, config: dict[str, Any], keys: set[str], file: str) -> list[Entry]:
    """The LoRA, and what was trained whole beside it, that config and keys mean."""
    _refuse_foreign(config, file)
    try:
        lora = (DoRA if config.get("use_dora") else LoRA)(
            rank=config["r"],
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            use_rslora=config.get("use_rslora", False),
            bias=config.get("bias", "none"),
        )
        patterns = {name: dict(config.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{file} is no config of a LoRA: {error}.") from None
    adapted = _adapted(keys)
    stacks = _stacks(model, config, adapted, file)
    modules = {stacks.get(path, path) for path in adapted}
    found = modules | {path.replace(".base_layer.", ".") for path in modules}
    named = [path for path, place in places.weights(model).items() if place.format.rows == 0]
    refuse_incomplete(named, config, found, file)
    lora = _with_patterns(lora, patterns, modules, file)
    refuse_unsaved(config, keys, file)
    entries = [Entry(lora, "target_modules", [(path, None) for path in _paths(model, modules)])]
    whole = sorted(whole_path(key) for key in keys if ".lora_" not in key)
    if whole:
        entries.append(Entry(FullFineTuning(), "modules_to_save", [(path, None) for path in whole]))
    return entries


_CONVERTED = ("pissa", "olora", "corda", "lora_ga")
"""Starts that PEFT can take out of what was trained."""


def _refuse_foreign(config: dict[str, Any], file: str) -> None:
    foreign = [name for name, value in config.items() if value and name not in _HARMLESS]
    if foreign:
        raise FileError(
            f"{file} uses {listed(sorted(foreign))}, which Veneer's LoRA does not have; merge it with PEFT."
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in ("gaussian", "orthogonal", "eva"):
        way = "merge it with PEFT"
        if init.lower().startswith(_CONVERTED):
            way = (
                "save it as a plain LoRA by PEFT's save_pretrained(path_initial_model_for_weight_conversion=start), "
                "where start is the folder of the adapter before training; where there is none, merge it with PEFT"
            )
        raise FileError(
            f"{file} was made with init_lora_weights='{init}', which changed base weights that the file does not hold; "
            f"{way}."
        )


def _adapted(keys: set[str]) -> set[str]:
    """The modules that have LoRA tensors, as PEFT paths without the prefix."""
    return {key.removeprefix(PREFIX).partition(".lora_")[0] for key in keys if ".lora_" in key}


def _stacks(model: nn.Module, config: dict[str, Any], adapted: set[str], file: str) -> dict[str, str]:
    """Veneer's paths of the parameters that PEFT adapts by name, by PEFT's paths of the wrappers around their module.

    The wrapper of the parameter that is registered last is outermost.
    """
    ends = names(config, "target_parameters", file)
    owners: dict[str, list[str]] = {}
    for path, place in places.weights(model).items():
        parameter = f"{place.owner_path}.{place.parameter}"
        if any(parameter == end or parameter.endswith(f".{end}") for end in ends):
            owners.setdefault(place.owner_path, []).append(path)
    found = {
        owner + ".base_layer" * (len(paths) - 1 - i): path
        for owner, paths in owners.items()
        for i, path in enumerate(paths)
    }
    lost = [path for wrapper, path in found.items() if wrapper not in adapted]
    if lost:
        raise CorruptFile(f"{file} names {listed(sorted(lost))}, for which its tensors are missing.")
    return found


def _with_patterns(lora: LoRA, patterns: dict[str, dict[str, Any]], modules: set[str], file: str) -> LoRA:
    """PEFT's patterns are regular expressions over path endings; those that match nothing are left out."""
    known: dict[str, Any] = {
        name: {
            f"re:(.*\\.)?({key})": value
            for key, value in table.items()
            if any(regex(rf"(.*\.)?({key})$", name, file).match(path) for path in modules)
        }
        for name, table in patterns.items()
    }
    try:
        return dataclasses.replace(lora, **known)
    except ValueError as error:
        raise CorruptFile(f"{file}: {error}") from None


def _paths(model: nn.Module, modules: set[str]) -> list[str]:
    """Veneer's paths of PEFT's wrapped modules, in the order of the model."""
    wanted = {path.replace(".base_layer.", ".") for path in modules}
    inventory = places.weights(model)
    parts = {f"{path}.in_proj_weight" if f"{path}.in_proj_weight" in inventory else path for path in wanted}
    order = {path: i for i, path in enumerate(inventory)}
    return sorted(parts, key=lambda path: (order.get(path, len(order)), path))
