"""LoRA as AdapterHub stores it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.errors import CorruptFile, listed
from veneer.handle import Claim
from veneer.interop.adapterhub.common import (
    Layout,
    NotInAdapterHub,
    depth,
    describe,
    left_out,
    refuse,
    refuse_missing,
    take,
)
from veneer.interop.peft.common import Entry
from veneer.lowrank import Pair
from veneer.methods import DoRA, LoRA
from veneer.seams import transformers


def read(
    model: nn.Module, layout: Layout, config: dict[str, Any], name: str, tensors: dict[str, Tensor], file: Path
) -> tuple[list[Entry], dict[str, Tensor]]:
    """The pairs of a folder, one entry; what is read is taken out of `tensors`."""
    plain = {"composition_mode": "add", "use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None}
    refuse(config, plain, file)
    rank, alpha = int(config["r"]), float(config["alpha"])
    version = re.fullmatch(r"adapters\.(\d+)\.(\d+).*", str(config.get("version")))
    if version and (int(version[1]), int(version[2])) < (1, 1):
        alpha = float(rank)  # those versions scaled by nothing, whatever alpha said
    prefix = transformers.base_prefix(model)
    known = [path.format(layer) for path in layout.linears.values() for layer in range(depth(model))]
    at, own = [], dict[str, Tensor]()
    for path in known:
        found = take(tensors, f"{path}.loras.{name}.")
        if not found:
            continue
        if found.keys() != {"lora_A", "lora_B"}:
            raise CorruptFile(f"{file}: {path} has {listed(sorted(found))}, not one lora_A and lora_B.")
        at.append((prefix + path, None))
        own |= {f"{prefix}{path}.0.A": found["lora_A"], f"{prefix}{path}.0.B": found["lora_B"]}
    refuse_missing(at, name, file)
    method = LoRA(rank=rank, alpha=alpha, dropout=float(config.get("dropout", 0.0)))
    return [Entry(method, " | ".join(path for path, _ in at), list(at))], own


def write(
    model: nn.Module, layout: Layout, claims: Sequence[Claim], name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and config of pairs; NotInAdapterHub where they do not all have one rank, scale and dropout."""
    prefix = transformers.base_prefix(model)
    known = {
        prefix + path.format(layer): (kind, layer)
        for kind, path in layout.linears.items()
        for layer in range(depth(model))
    }
    tensors: dict[str, Tensor] = {}
    at: list[tuple[str, int]] = []
    scales: set[tuple[int, float, float]] = set()
    for claim in claims:
        pair, place = claim.delta, claim.place
        if place.path not in known or known[place.path] in at or place.spans or isinstance(claim.method, DoRA):
            raise NotInAdapterHub(f"it has no LoRA on {place.path}; it knows {listed(layout.linears, 9)}")
        assert isinstance(pair, Pair)
        assert isinstance(claim.method, LoRA)
        if len(pair.parts()) > 1:
            raise NotInAdapterHub("it cannot subtract a start such as PiSSA's; bring it to plain LoRA with lora_rank")
        at.append(known[place.path])
        scales.add((len(pair.A), pair.scale, claim.method.dropout))
        stem = f"{place.path.removeprefix(prefix)}.loras.{name}"
        tensors |= {f"{stem}.lora_A": pair.A.detach(), f"{stem}.lora_B": pair.B.detach()}
    if len(scales) > 1:
        raise NotInAdapterHub("its LoRAs have one rank, scale and dropout")
    (rank, scale, dropout) = scales.pop()
    kinds = {kind for kind, _ in at}
    config = {
        "architecture": "lora",
        "alpha": scale * rank,
        "attn_matrices": sorted(kinds & {"q", "k", "v"}),
        "dropout": dropout,
        "intermediate_lora": "intermediate" in kinds,
        "leave_out": left_out(model, at),
        "output_lora": "output" in kinds,
        "r": rank,
        "selfattn_lora": bool(kinds & {"q", "k", "v"}),
    }
    return tensors, describe(model, name, config)
