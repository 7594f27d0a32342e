"""Fusions of bottleneck adapters as AdapterHub stores them: the parts are folders of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer import files
from veneer.delta import Method
from veneer.errors import CorruptFile, FileError, listed
from veneer.handle import Claim
from veneer.interop.adapterhub import bottleneck
from veneer.interop.adapterhub.common import (
    CONFIG,
    FUSION_CONFIG,
    FUSION_PICKLE,
    FUSION_TENSORS,
    Found,
    Layout,
    NotInAdapterHub,
    base_of,
    config_of,
    describe,
    layout_of,
    refuse,
    sublayers,
    take,
    tensors_of,
)
from veneer.interop.peft.common import Entry
from veneer.methods import AdapterFusion, BottleneckAdapter


def read(model: nn.Module, path: Path, read_part: Callable[[nn.Module, Path], Found]) -> Found:
    """A fusion and its parts, which `read_part` reads."""
    file = path / FUSION_CONFIG
    described = files.read_json(file)
    layout, config = layout_of(model, path), config_of(described, file)
    plain = {"key": True, "query": True, "query_before_ln": False, "residual_before": False, "temperature": False}
    refuse(config, plain, file)
    name = str(described.get("name"))
    names = described.get("adapter_names") or name.split(",")
    parts = {part: read_part(model, _part(path, part)) for part in names}
    tensors, source = tensors_of(path, FUSION_TENSORS, FUSION_PICKLE, model)
    own: dict[str, Tensor] = {}
    stems = {place.path: layout.stem(role, layer) for (role, layer), place in sublayers(model).items()}
    groups: list[tuple[AdapterFusion, list[tuple[str, None]]]] = []
    for place_path in [at for entry in parts[names[0]].entries for at, _ in entry.places]:
        found = take(tensors, f"{stems[place_path]}.adapter_fusion_layer.{name}.")
        if not {"query.weight", "query.bias", "key.weight"} <= found.keys():
            raise CorruptFile(f"{source}: the query and key at {stems[place_path]} are missing.")
        value = found.get("value.weight")
        method = AdapterFusion(
            parts={part: _at(one, place_path, part) for part, one in parts.items()},
            regularization=0.01 if config.get("regularization") else 0.0,
        )
        for known, places_ in groups:
            if known == method:
                places_.append((place_path, None))
                break
        else:
            groups.append((method, [(place_path, None)]))
        stem = f"{place_path}.0"
        own |= {
            f"{stem}.query": found["query.weight"],
            f"{stem}.query_bias": found["query.bias"],
            f"{stem}.key": found["key.weight"],
            f"{stem}.value": torch.eye(len(found["query.weight"])) if value is None else value,
        }
        for part, one in parts.items():
            below = f"{place_path}.0.bottleneck."
            mine = {key: tensor for key, tensor in one.tensors.items() if key.startswith(below)}
            own |= {f"{stem}.parts.{part}.{key.removeprefix(below)}": tensor for key, tensor in mine.items()}
    if tensors:
        raise CorruptFile(f"{source}: {listed(sorted(tensors))} left over. They do not belong to the parts' places.")
    entries = [Entry(method, "mlp", list(at)) for method, at in groups]
    return Found(entries, own, base_of(described), source)


def _part(path: Path, part: str) -> Path:
    for folder in (path / part, path.parent / part):
        if (folder / CONFIG).exists():
            return folder
    raise FileError(f"{path} is a fusion of '{part}', which lies neither in it nor beside it. Put its folder there.")


def _at(part: Found, place: str, name: str) -> Method:
    for entry in part.entries:
        if any(path == place for path, _ in entry.places):
            return entry.method
    raise FileError(f"{part.file}: the part '{name}' has nothing at {place}, where another part of its fusion stands.")


def write(
    model: nn.Module, layout: Layout, claims: Sequence[Claim]
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """The folders of a fusion and its parts, by their place within."""
    at = {place.path: key for key, place in sublayers(model).items()}
    names = sorted(cast(AdapterFusion, claims[0].method).parts)
    fused = ",".join(names)
    tensors: dict[str, Tensor] = {}
    parts: dict[str, list[bottleneck.Written]] = {name: [] for name in names}
    for claim in claims:
        method, own = cast(AdapterFusion, claim.method), dict(claim.delta.state_dict())
        if sorted(method.parts) != names or not all(
            isinstance(one, BottleneckAdapter) for one in method.parts.values()
        ):
            raise NotInAdapterHub("it fuses the same plain bottleneck adapters everywhere")
        role, layer = at[claim.place.path]
        stem = f"{(layout.attention if role == 'attention' else layout.mlp).format(layer)}.adapter_fusion_layer.{fused}"
        tensors |= {
            f"{stem}.query.weight": own["query"],
            f"{stem}.query.bias": own["query_bias"],
            f"{stem}.key.weight": own["key"],
            f"{stem}.key.bias": own["query_bias"].new_zeros(len(own["key"])),
            f"{stem}.value.weight": own["value"],
        }
        for name in names:
            below = f"parts.{name}."
            mine = {key.removeprefix(below): tensor for key, tensor in own.items() if key.startswith(below)}
            parts[name].append((claim, cast(BottleneckAdapter, method.parts[name]), mine))
    config = {
        "key": True, "query": True, "value": True, "query_before_ln": False, "regularization": True,
        "residual_before": False, "temperature": False, "value_before_softmax": True, "value_initialized": True,
        "dropout_prob": None,
    }  # fmt: skip
    described = describe(model, fused, config) | {"adapter_names": names}
    written = {name: bottleneck.write(model, layout, group, name) for name, group in parts.items()}
    return {"": (tensors, described), **written}
