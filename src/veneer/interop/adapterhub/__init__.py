"""AdapterHub's folders: bottleneck adapters, prefixes, LoRA, and fusions of bottleneck adapters.

`adapter_config.json` describes the method, `adapter.safetensors` (or the pickle `pytorch_adapter.bin`, which is read
with weights_only=True) holds the tensors under the names that AdapterHub's own modules have in its model classes. Those
names are known here for the families of `LAYOUTS`. A fusion is `adapter_fusion_config.json` and
`model_adapter_fusion.safetensors`; its parts are folders of their own, within it or beside it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from veneer import files
from veneer.errors import CorruptFile, FileError, listed
from veneer.handle import Adapter
from veneer.interop.adapterhub import bottleneck, fusion, lora, prefix
from veneer.interop.adapterhub.common import (
    CONFIG,
    FILES,
    FUSION_CONFIG,
    FUSION_TENSORS,
    LAYOUTS,
    PICKLE,
    TENSORS,
    Found,
    NotInAdapterHub,
    base_of,
    config_of,
    layout_of,
    tensors_of,
)
from veneer.methods import AdapterFusion, BottleneckAdapter, LoRA, LoRAFA, PrefixTuning
from veneer.seams import transformers

__all__ = [
    "CONFIG",
    "FILES",
    "FUSION_CONFIG",
    "FUSION_TENSORS",
    "LAYOUTS",
    "TENSORS",
    "Found",
    "NotInAdapterHub",
    "read",
    "recognises",
    "to_files",
]


def recognises(path: Path) -> bool:
    """Whether a folder is AdapterHub's; PEFT's config has the same name, and a `peft_type`."""
    if (path / FUSION_CONFIG).exists():
        return True
    return (path / CONFIG).exists() and "config" in files.read_json(path / CONFIG)


def read(model: nn.Module, path: Path) -> Found:
    """The entries and tensors of a folder; FileError for what Veneer has not, CorruptFile for what is left over."""
    if (path / FUSION_CONFIG).exists():
        return fusion.read(model, path, read)
    described = files.read_json(path / CONFIG)
    layout = layout_of(model, path)
    config, name, file = config_of(described, path / CONFIG), str(described.get("name")), path / CONFIG
    tensors, source = tensors_of(path, TENSORS, PICKLE, model)
    kind = config.get("architecture")
    readers = {None: bottleneck.read, "prefix_tuning": prefix.read, "lora": lora.read}
    if kind not in readers:
        raise FileError(f"{file} holds '{kind}'; Veneer reads AdapterHub's bottleneck, prefix_tuning, lora and fusion.")
    entries, own = readers[kind](model, layout, config | {"version": described.get("version")}, name, tensors, file)
    if tensors:
        raise CorruptFile(
            f"{source}: {listed(sorted(tensors))} left over. They do not belong to this config and model."
        )
    return Found(entries, own, base_of(described), source)


def to_files(adapter: Adapter) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """By folder within (empty: itself) the tensors and config of an adapter; NotInAdapterHub where it has no such."""
    model = adapter.model
    kind = transformers.describe(model).get("model_type", type(model).__name__)
    if kind not in LAYOUTS:
        raise NotInAdapterHub(f"its names are known here for {listed(LAYOUTS, 9)}, not for {kind}")
    layout = LAYOUTS[kind]
    methods = {type(claim.method) for claim in adapter.claims}
    name = re.sub(r"\W", "_", adapter.name)
    if methods == {BottleneckAdapter}:
        own = [(one, cast(BottleneckAdapter, one.method), dict(one.delta.state_dict())) for one in adapter.claims]
        stripped = [
            (one, way, {k.removeprefix("bottleneck."): t for k, t in tensors.items()}) for one, way, tensors in own
        ]
        return {"": bottleneck.write(model, layout, stripped, name)}
    if methods == {PrefixTuning}:
        return {"": prefix.write(model, adapter.claims, name)}
    if methods <= {LoRA, LoRAFA} and not adapter.also_train:
        return {"": lora.write(model, layout, adapter.claims, name)}
    if methods == {AdapterFusion}:
        return fusion.write(model, layout, adapter.claims)
    raise NotInAdapterHub(f"it has no {listed(sorted(one.__name__ for one in methods))} in one adapter")
