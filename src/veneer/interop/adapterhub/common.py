"""What AdapterHub's kinds of folders share: their files, and the names of its modules in the families of `LAYOUTS`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer import files, places
from veneer.delta import Place
from veneer.errors import CorruptFile, FileError, UnsafeFile, WrongModel, listed
from veneer.interop.peft.common import Entry
from veneer.seams import transformers

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
FUSION_CONFIG = "adapter_fusion_config.json"
FUSION_TENSORS, FUSION_PICKLE = "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"
FILES = (CONFIG, TENSORS, PICKLE, FUSION_CONFIG, FUSION_TENSORS, FUSION_PICKLE)
VERSION = "adapters.1.3.0"
"""The version whose files these are."""

Role = Literal["attention", "mlp"]
ROLES: tuple[Role, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class Layout:
    """Where AdapterHub keeps its modules in one family; {} is the number of the layer."""

    attention: str
    mlp: str
    linears: Mapping[str, str]
    """The linears that its LoRA knows, by its own names for them."""
    post_norm: bool = False
    """Whether the norm follows the residual add; elsewhere its parallel adapter reads before the norm, ours behind."""

    def stem(self, role: Role, layer: int) -> str:
        """What the names of a sublayer's modules begin with."""
        return (self.attention if role == "attention" else self.mlp).format(layer)


_BERT = Layout(
    "encoder.layer.{}.attention.output",
    "encoder.layer.{}.output",
    {
        "q": "encoder.layer.{}.attention.self.query",
        "k": "encoder.layer.{}.attention.self.key",
        "v": "encoder.layer.{}.attention.self.value",
        "intermediate": "encoder.layer.{}.intermediate.dense",
        "output": "encoder.layer.{}.output.dense",
    },
    post_norm=True,
)
_LLAMA = Layout(
    "layers.{}.attention_adapters",
    "layers.{}.output_adapters",
    {
        "q": "layers.{}.self_attn.q_proj",
        "k": "layers.{}.self_attn.k_proj",
        "v": "layers.{}.self_attn.v_proj",
        "intermediate": "layers.{}.mlp.down_proj",  # so it is, and "output" the other one
        "output": "layers.{}.mlp.up_proj",
    },
)
_GPT2 = Layout(
    "h.{}.attention_adapters",
    "h.{}.output_adapters",
    {"intermediate": "h.{}.mlp.c_fc", "output": "h.{}.mlp.c_proj"},
)
LAYOUTS = {
    "bert": _BERT, "electra": _BERT, "roberta": _BERT, "xlm-roberta": _BERT,
    "gpt2": _GPT2, "llama": _LLAMA, "mistral": _LLAMA,
}  # fmt: skip


class NotInAdapterHub(Exception):
    """AdapterHub has no folder for this adapter; the message says why."""


@dataclass(frozen=True)
class Found:
    """What a folder means on a model: methods at places, and their tensors under Veneer's keys."""

    entries: list[Entry]
    tensors: dict[str, Tensor]
    base: dict[str, str]
    file: Path


def layout_of(model: nn.Module, path: Path) -> Layout:
    """The names in this family; FileError for another family."""
    kind = transformers.describe(model).get("model_type", type(model).__name__)
    if kind not in LAYOUTS:
        raise FileError(f"{path}: AdapterHub's names are known here for {listed(LAYOUTS, 9)}, not for {kind}.")
    return LAYOUTS[kind]


def config_of(described: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What a folder says of its method; FileError where that is a name alone."""
    config = described.get("config")
    if not isinstance(config, dict):
        raise FileError(f"{file}: config is {config!r}; only folders that carry their whole configuration are read.")
    return config


def tensors_of(path: Path, safe: str, pickle: str, model: nn.Module) -> tuple[dict[str, Tensor], Path]:
    """The tensors under the names they have in the bare model, and the file that they come from."""
    if (path / safe).exists():
        file, found = path / safe, files.read_tensors(path / safe)
    elif (path / pickle).exists():
        file = path / pickle
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch meets in a file that is no plain state dict
            raise UnsafeFile(f"{file} is no plain state dict, so reading it could run code: {error}") from None
        if not isinstance(found, dict) or not all(isinstance(one, Tensor) for one in found.values()):
            raise CorruptFile(f"{file} holds something else than tensors by name.")
        if broken := [key for key, tensor in found.items() if not torch.isfinite(tensor).all()]:
            raise CorruptFile(f"{file}: {listed(broken)} holds NaN or infinite numbers. Use an earlier save.")
    else:
        raise FileError(f"{path} holds neither {safe} nor {pickle}.")
    prefix = transformers.base_prefix_name(model)
    return {key.removeprefix(f"{prefix}.") if prefix else key: tensor for key, tensor in found.items()}, file


def take(tensors: dict[str, Tensor], stem: str) -> dict[str, Tensor]:
    """What lies below a name, taken out."""
    keys = [key for key in tensors if key.startswith(stem)]
    return {key.removeprefix(stem): tensors.pop(key) for key in keys}


def sublayers(model: nn.Module) -> dict[tuple[Role, int], Place]:
    """Attention and MLP of every layer; FileError where a layer has several."""
    found: dict[tuple[Role, int], Place] = {}
    for role in ROLES:
        for place in places.find(model, role, "sublayer"):
            if (role, place.layer) in found:
                raise FileError(
                    f"Layer {place.layer} of {type(model).__name__} has two of {role}; such models are not read."
                )
            found[role, place.layer] = place
    return found


def depth(model: nn.Module) -> int:
    """How many layers the model has."""
    return 1 + max(layer for _, layer in sublayers(model))


def refuse(config: Mapping[str, Any], plain: Mapping[str, Any], file: Path) -> None:
    """Options that change what is computed and that Veneer does not have."""
    if odd := [f"{key}={config[key]}" for key, usual in plain.items() if config.get(key, usual) != usual]:
        raise FileError(f"{file}: {listed(odd)} is nothing that Veneer has.")


def refuse_missing(found: object, name: str, file: Path) -> None:
    """WrongModel where nothing was found."""
    if not found:
        raise WrongModel(f"{file}: the model has no layer that the tensors of '{name}' belong to.")


def describe(model: nn.Module, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config file of a folder."""
    base = transformers.describe(model)
    return {
        "config": dict(config),
        "hidden_size": transformers.width(model),
        "model_class": base["class"],
        "model_name": base.get("name_or_path") or None,
        "model_type": base["model_type"],
        "name": name,
        "version": VERSION,
    }


def left_out(model: nn.Module, at: Iterable[tuple[str, int]]) -> list[int]:
    """The layers without anything; NotInAdapterHub where the others do not all have the same."""
    roles: dict[int, set[str]] = {}
    for role, layer in at:
        roles.setdefault(layer, set()).add(role)
    if len({frozenset(one) for one in roles.values()}) > 1:
        raise NotInAdapterHub("it stands at the same places of every layer that it does not leave out")
    return [layer for layer in range(depth(model)) if layer not in roles]


def base_of(written: Mapping[str, Any]) -> dict[str, str]:
    """What a folder's file says of the model it was made on."""
    return {"class": str(written.get("model_class", "")), "name_or_path": str(written.get("model_name") or "")}
