"""Prefixes as AdapterHub stores them: one tensor for all layers, or the network that makes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import places
from veneer.errors import CorruptFile, FileError, WrongModel, listed
from veneer.handle import Claim
from veneer.interop.adapterhub.common import Layout, NotInAdapterHub, depth, describe, refuse
from veneer.interop.peft.common import Entry
from veneer.methods import PrefixTuning
from veneer.slots import Slots


def read(
    model: nn.Module, layout: Layout, config: dict[str, Any], name: str, tensors: dict[str, Tensor], file: Path
) -> tuple[list[Entry], dict[str, Tensor]]:
    """The prefixes of a folder, one entry; what is read is taken out of `tensors`."""
    refuse(config, {"use_gating": False}, file)
    left_out = set(config.get("leave_out") or ())
    found = [place for place in places.find(model, "attention", "attention") if place.layer not in left_out]
    # every layer holds the same pool of prefixes, so pickles name each tensor once more for each layer
    stem = re.compile(rf"(.*\.)?prefix_tuning(\.pool)?\.prefix_tunings\.{re.escape(name)}\.\w+\.")
    parts = {stem.sub("", key): tensors.pop(key) for key in list(tensors) if stem.match(key)}
    length = int(config.get("prefix_length", 0))
    if config.get("flat") and "control_trans" in parts:
        flat = parts["control_trans"]
    elif {"wte.weight", "control_trans.0.weight", "control_trans.2.weight"} <= parts.keys():
        activation = str(config.get("non_linearity")).lower()
        if activation != "tanh":
            raise FileError(f"{file}: non_linearity={activation} of a prefix's network is not read; only tanh is.")
        inner = nn.functional.linear(
            parts["wte.weight"], parts["control_trans.0.weight"], parts["control_trans.0.bias"]
        )
        flat = nn.functional.linear(inner.tanh(), parts["control_trans.2.weight"], parts["control_trans.2.bias"])
    else:
        raise CorruptFile(f"{file}: a prefix's tensors are missing; there are {listed(sorted(parts))}.")
    own: dict[str, Tensor] = {}
    if not found or flat.numel() % (length * 2 * len(found) * found[0].shape[0] or 1):
        raise WrongModel(f"{file}: {flat.numel()} numbers are no prefix of {length} at {len(found)} attentions.")
    both = flat.reshape(length, 2 * len(found), found[0].shape[0], -1).permute(1, 2, 0, 3)
    for place, key, value in zip(found, both[::2], both[1::2], strict=True):
        own |= {f"{place.path}.0.key": key, f"{place.path}.0.value": value}
    return [Entry(PrefixTuning(length=length), "attention", [(place.path, None) for place in found])], own


def write(model: nn.Module, claims: Sequence[Claim], name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and config of prefixes, which have one shape."""
    slots = [claim.delta for claim in claims if isinstance(claim.delta, Slots)]
    if len({one.key.shape for one in slots} | {one.value.shape for one in slots}) > 1 or len(slots) < len(claims):
        raise NotInAdapterHub("its prefixes have keys and values of one shape at every layer")
    layers = [claim.place.layer for claim in claims]
    if layers != sorted(set(layers)):
        raise NotInAdapterHub("it has one prefix a layer, in their order")
    parts = [tensor.detach() for one in slots for tensor in (one.key, one.value)]
    flat = torch.stack(parts).permute(2, 0, 1, 3).flatten()
    config = {
        "architecture": "prefix_tuning",
        "flat": True,
        "leave_out": [layer for layer in range(depth(model)) if layer not in layers],
        "prefix_length": slots[0].key.shape[1],
    }
    where = "self_prefix"
    return {f"prefix_tuning.prefix_tunings.{name}.{where}.control_trans": flat}, describe(model, name, config)
