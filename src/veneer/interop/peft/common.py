"""What every kind of PEFT file has in common: keys, the fields that describe the base, modules trained whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veneer import site
from veneer.delta import Method, Span
from veneer.errors import CorruptFile, listed
from veneer.handle import Adapter, Claim
from veneer.seams import transformers

PREFIX = "base_model.model."
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class NotInPEFT(Exception):
    """PEFT has no file for this adapter; the message says why."""


@dataclass(frozen=True)
class Entry:
    """One method and the exact places it stands at, as a file names them."""

    method: Method
    where: str
    places: list[tuple[str, tuple[Span, ...] | None]]


class Kind(Protocol):
    """One `peft_type`: a module beside this one with these names."""

    METHODS: tuple[type[Method], ...]
    """The methods whose adapters it can hold, beside modules trained whole."""

    def to_tensors(self, claims: Sequence[Claim]) -> dict[str, Tensor]:
        """The tensors under PEFT's keys; NotInPEFT where PEFT has no such thing."""

    def from_tensors(self, claims: Sequence[Claim], tensors: dict[str, Tensor]) -> None:
        """Fill the claims' deltas from tensors that have the keys and shapes of `to_tensors`."""

    def to_config(self, adapter: Adapter) -> dict[str, Any]:
        """`adapter_config.json` for an adapter that `to_tensors` accepts."""

    def from_config(self, model: nn.Module, config: dict[str, Any], keys: set[str], file: str) -> list[Entry]:
        """The methods and places that PEFT's config and tensor keys mean on this model.

        Raises FileError for options that change what the adapter computes and that Veneer does not have, CorruptFile
        for fields of the wrong type or modules that the config names but the tensors lack.
        """


def base_fields(adapter: Adapter) -> dict[str, Any]:
    """The fields that every PEFT config has."""
    base = transformers.describe(adapter.model)
    return {
        "base_model_name_or_path": base.get("name_or_path") or None,
        "inference_mode": True,
        "modules_to_save": sorted(adapter.also_train) or None,
        "task_type": next((task for end, task in _TASKS.items() if base["class"].endswith(end)), None),
    }


def target_modules(model: nn.Module, adapted: set[str]) -> list[str]:
    """Last components where they mean exactly the adapted modules, whole paths otherwise."""
    targets: set[str] = set()
    paths = [path for path, _ in site.base_modules(model)]
    for path in adapted:
        last = path.rpartition(".")[2]
        alike = {other for other in paths if other == last or other.endswith(f".{last}")}
        targets.add(last if alike <= adapted else path)
    return sorted(targets)


def names(config: dict[str, Any], field: str, file: str) -> list[str]:
    """A list of module names, or none at all."""
    names = config.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorruptFile(f"{file}: {field} is {names!r}, not a list of module names.")
    return names


def regex(text: str, field: str, file: str) -> re.Pattern[str]:
    """A pattern of the config, compiled."""
    try:
        return re.compile(text)
    except re.error as error:
        raise CorruptFile(f"{file}: {field} holds {text!r}, no regular expression: {error}.") from None


def means(targets: list[str] | str, path: str, field: str, file: str) -> bool:
    """Whether PEFT's target (a regular expression, or endings of paths) means a module."""
    if isinstance(targets, str):
        return regex(targets, field, file).fullmatch(path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def refuse_incomplete(paths: Iterable[str], config: dict[str, Any], found: set[str], file: str) -> None:
    """A module that the config names and the model has must have tensors: a file may have lost some."""
    if config.get("exclude_modules") or config.get("layers_to_transform") is not None:
        return
    targets = config.get("target_modules")
    if targets == "all-linear":
        return
    targets = targets if isinstance(targets, str) else names(config, "target_modules", file)
    saved = names(config, "modules_to_save", file)
    named = {path for path in paths if means(targets, path, "target_modules", file)}
    named = {path for path in named if not any(re.search(rf"(^|\.){re.escape(s)}($|\.)", path) for s in saved)}
    if named - found:
        raise CorruptFile(f"{file} names {listed(sorted(named - found))}, for which its tensors are missing.")


def refuse_unsaved(config: dict[str, Any], keys: set[str], file: str) -> None:
    """A module that the config says was trained whole must have tensors."""
    for name in names(config, "modules_to_save", file):
        if not any(re.fullmatch(rf"(.*\.)?{re.escape(name)}\..*", whole_path(key)) for key in keys):
            raise CorruptFile(f"{file} says that {name} was trained whole, but its tensors are missing.")


def whole_path(key: str) -> str:
    """The path of a parameter trained whole."""
    return re.sub(r"(\.base_layer)+\.", ".", key.removeprefix(PREFIX))


@torch.no_grad()
def fill(parameter: Tensor, tensor: Tensor) -> None:
    """Copy a tensor in; a wider dtype in the file is kept, a narrower one is widened without loss."""
    dtype = torch.promote_types(parameter.dtype, tensor.dtype)
    if dtype == parameter.dtype:  # in place: an optimizer's buffer, or compiled code, may know the memory
        with torch.no_grad():
            parameter.copy_(tensor)
        return
    parameter.data = tensor.to(device=parameter.device, dtype=dtype, copy=True).contiguous()
