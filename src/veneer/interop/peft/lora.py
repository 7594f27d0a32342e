"""PEFT's LORA files, which vLLM, SGLang and llama.cpp's converter read too.

PEFT has one A and B a module. Roles of a fused projection, LoRAs stacked at one place, and a start that is subtracted
for good are written as one pair whose A are put under each other and whose B stand in their own rows and columns, zero
elsewhere: the same sum, exactly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from veneer.delta import Method, Place, row_index
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import PREFIX, NotInPEFT, base_fields, fill, target_modules
from veneer.interop.peft.lora_config import from_config
from veneer.lowrank import Pair
from veneer.methods import FullFineTuning, LoRA

METHODS: tuple[type[Method], ...] = (LoRA,)


def to_tensors(claims: Sequence[Claim]) -> dict[str, Tensor]:
    """A and B of each module under PEFT's keys, and what was trained whole."""
    tensors: dict[str, Tensor] = {}
    groups = _groups(claims)
    for group in groups.values():
        place = group[0].place
        key_a, key_b = _keys(place)
        tensors[key_a] = torch.cat([A.detach() for claim in group for A, _, _ in _pair(claim).parts()])
        tensors[key_b] = _joined(group) * _peft_factor(place)
    adapted = {claim.place.owner_path for group in groups.values() for claim in group}
    for claim in claims:
        if isinstance(claim.method, FullFineTuning):
            (value,) = claim.delta.parameters()
            for place in (claim.place, *claim.place.tied):
                tensors[_whole_key(place, adapted)] = value.detach()
    return tensors


def from_tensors(claims: Sequence[Claim], tensors: dict[str, Tensor]) -> None:
    """Fill the claims' A and B."""
    groups = _groups(claims)
    for group in groups.values():
        key_a, key_b = _keys(group[0].place)
        start = 0
        for claim in group:
            rows = _rows(claim.place, tensors[key_b])
            for A, B, sign in _pair(claim).parts():
                columns = slice(start, start + len(A))
                fill(A, tensors[key_a][columns])
                fill(B, tensors[key_b][rows][:, columns] * (sign / _peft_factor(claim.place)))
                start += len(A)
    adapted = {claim.place.owner_path for group in groups.values() for claim in group}
    for claim in claims:
        if isinstance(claim.method, FullFineTuning):
            (value,) = claim.delta.parameters()
            fill(value, tensors[_whole_key(claim.place, adapted)])


def to_config(adapter: Adapter) -> dict[str, Any]:
    """`adapter_config.json`: one rank and alpha, and patterns for the others."""
    groups = _groups(adapter.claims)
    rslora = all(isinstance(c.method, LoRA) and c.method.use_rslora for group in groups.values() for c in group)
    sizes: dict[str, tuple[int, float]] = {}
    for group in groups.values():
        path = _attention(group[0].place) or group[0].place.owner_path
        size = _size(group, rslora)
        if sizes.setdefault(path, size) != size:
            raise NotInPEFT(f"PEFT adapts in_proj_weight and out_proj of {path} with one rank and one alpha")
    (rank, alpha), _ = Counter(sizes.values()).most_common(1)[0]
    lora = next(claim.method for group in groups.values() for claim in group)
    assert isinstance(lora, LoRA)
    return {
        **base_fields(adapter),
        "alpha_pattern": {path: a for path, (_, a) in sorted(sizes.items()) if a != alpha},
        "bias": lora.bias,
        "fan_in_fan_out": all(_is_conv1d(group[0].place) for group in groups.values()),
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {path: r for path, (r, _) in sorted(sizes.items()) if r != rank},
        "target_modules": target_modules(adapter.model, set(sizes)),
        "use_dora": False,
        "use_rslora": rslora,
    }


def _groups(claims: Sequence[Claim]) -> dict[str, list[Claim]]:
    """LoRA claims by the weight they change, in order; refuses what PEFT's LoRA cannot hold."""
    groups: dict[str, list[Claim]] = {}
    for claim in claims:
        if isinstance(claim.method, LoRA):
            groups.setdefault(f"{claim.place.owner_path}:{claim.place.parameter}", []).append(claim)
        elif not isinstance(claim.method, FullFineTuning):
            raise NotInPEFT(f"{type(claim.method).__name__} is no method that PEFT's LoRA files can hold")
    if not groups:
        raise NotInPEFT("PEFT's files hold trained modules only beside a method such as LoRA")
    for path, group in groups.items():
        if len({_pair(claim).scale for claim in group}) > 1:
            raise NotInPEFT(f"{path} has LoRAs of different scales, which one A and B cannot hold bit for bit")
    dropouts = {claim.method.dropout for group in groups.values() for claim in group if isinstance(claim.method, LoRA)}
    if len(dropouts) > 1:
        raise NotInPEFT("the LoRAs have different dropouts")
    halves = Counter(_attention(group[0].place) for group in groups.values())
    del halves[""]
    for path, count in halves.items():
        if count != 2:
            raise NotInPEFT(f"PEFT adapts in_proj_weight and out_proj of {path} only together")
    return groups


def _pair(claim: Claim) -> Pair:
    assert isinstance(claim.delta, Pair)
    return claim.delta


def _rows(place: Place, B: Tensor) -> Tensor:
    """The rows of the module's B that belong to this place."""
    return row_index(place.spans or ((0, len(B)),), B.device)


def _joined(group: Sequence[Claim]) -> Tensor:
    place, first = group[0].place, _pair(group[0]).B
    if len(group) == 1 and place.spans is None:
        return torch.cat([B.detach() * sign for _, B, sign in _pair(group[0]).parts()], dim=1)
    out = place.format.shape(place.owner, place.parameter)[0]
    joined = first.new_zeros(out, _rank(group))
    start = 0
    for claim in group:
        for A, B, sign in _pair(claim).parts():
            joined[_rows(claim.place, joined), start : start + len(A)] = B.detach() * sign
            start += len(A)
    return joined


def _rank(group: Sequence[Claim]) -> int:
    """That of the one pair which all of them become; a start that is subtracted has its own share."""
    return sum(len(A) for claim in group for A, _, _ in _pair(claim).parts())


def _size(group: Sequence[Claim], rslora: bool) -> tuple[int, float]:
    """Rank and alpha that give the group's scale."""
    rank = _rank(group)
    scale = _pair(group[0]).scale
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    return rank, round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _peft_factor(place: Place) -> float:
    """PEFT's MultiheadAttention adds the change of out_proj twice (seen in 0.21.2), so its B is written halved, which
    is exact, and read doubled; either side then computes what the other does."""
    return 0.5 if _is_out_proj(place) else 1.0


def _is_conv1d(place: Place) -> bool:
    return type(place.owner).__name__ == "Conv1D"


def _attention(place: Place) -> str:
    """The nn.MultiheadAttention whose projection this is, or the empty string."""
    if place.parameter == "in_proj_weight":
        return place.owner_path
    return place.owner_path.removesuffix(".out_proj") if _is_out_proj(place) else ""


def _is_out_proj(place: Place) -> bool:
    return isinstance(place.owner, NonDynamicallyQuantizableLinear)


def _stem(place: Place) -> str:
    """PEFT's path of a wrapped layer."""
    if _is_out_proj(place):
        return f"{PREFIX}{_attention(place)}.base_layer.out_proj"
    return f"{PREFIX}{place.owner_path}"


def _keys(place: Place) -> tuple[str, str]:
    if place.functional and place.parameter not in ("in_proj_weight", "weight"):
        raise NotInPEFT(f"PEFT has no LoRA on {place.path}")
    if isinstance(place.owner, nn.Embedding):
        return f"{_stem(place)}.lora_embedding_A", f"{_stem(place)}.lora_embedding_B"
    return f"{_stem(place)}.lora_A.weight", f"{_stem(place)}.lora_B.weight"


def _whole_key(place: Place, adapted: set[str]) -> str:
    """PEFT's key of a parameter trained whole: below `base_layer` where LoRA wraps its module."""
    if place.owner_path in adapted:
        return f"{_stem(place)}.base_layer.{place.parameter}"
    if place.parameter == "in_proj_bias" and f"{place.owner_path}.out_proj" in adapted:
        raise NotInPEFT("PEFT does not save the in_proj_bias of an nn.MultiheadAttention that it adapts")
    return f"{PREFIX}{place.owner_path}.{place.parameter}"


__all__ = ["METHODS", "from_config", "from_tensors", "to_config", "to_tensors"]
