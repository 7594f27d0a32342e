"""PEFT's LORA files, which vLLM, SGLang and llama.cpp's converter read too.

PEFT has one A and B a module. Roles of a fused projection, LoRAs stacked at one place, and a start that is subtracted
for good are written as one pair whose A are put under each other and whose B stand in their own rows and columns, zero
elsewhere: the same sum, exactly.

A stack of experts is one of PEFT's `target_parameters`: A [experts·rank, in] has the experts one after the other, B
[out, rank·experts] the experts of each rank side by side. Where several parameters of one module are adapted, PEFT
wraps the module once for each, the first registered innermost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from veneer.delta import Method, Place, row_index
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import PREFIX, NotInPEFT, base_fields, fill, target_modules
from veneer.interop.peft.lora_config import from_config
from veneer.lowrank import Pair
from veneer.methods import DoRA, FullFineTuning, LoRA, LoRAFA

METHODS: tuple[type[Method], ...] = (LoRA, DoRA, LoRAFA)


def to_tensors(claims: Sequence[Claim]) -> dict[str, Tensor]:
    """A and B of each module under PEFT's keys, and what was trained whole."""
    tensors: dict[str, Tensor] = {}
    groups = _groups(claims)
    for group in groups.values():
        place = group[0].place
        key_a, key_b = _keys(place, groups)
        A = _joint([A.detach() for A, _, _, _ in _parts(group)], place.format.rows)
        B = _joined(group)
        if (factor := _peft_factor(place)) != 1.0:
            B = B * factor
        if _is_stack(place):
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        tensors[key_a], tensors[key_b] = A, B
        if isinstance(group[0].method, DoRA):
            tensors[_magnitude_key(place)] = group[0].delta.get_parameter("m").detach().view(_magnitude_shape(place))
    for claim in claims:
        if isinstance(claim.method, FullFineTuning):
            (value,) = claim.delta.parameters()
            for place in (claim.place, *claim.place.tied):
                tensors[_whole_key(place, groups)] = value.detach()
    return tensors


def from_tensors(claims: Sequence[Claim], tensors: dict[str, Tensor]) -> None:
    """Fill the claims' A and B."""
    groups = _groups(claims)
    for group in groups.values():
        A, B = _factors(group[0].place, groups, tensors)
        dim, start = group[0].place.format.rows, 0
        for claim in group:
            for own_A, own_B, sign, rank in _parts([claim]):
                fill(own_A, A.narrow(dim, start, rank))
                columns = B.narrow(dim + 1, start, rank).index_select(dim, _rows(claim.place, B))
                fill(own_B, columns * (sign / _peft_factor(claim.place)))
                start += rank
            if isinstance(claim.method, DoRA):
                fill(claim.delta.get_parameter("m"), tensors[_magnitude_key(claim.place)].flatten())
    for claim in claims:
        if isinstance(claim.method, FullFineTuning):
            (value,) = claim.delta.parameters()
            fill(value, tensors[_whole_key(claim.place, groups)])


def to_config(adapter: Adapter) -> dict[str, Any]:
    """`adapter_config.json`: one rank and alpha, and patterns for the others."""
    groups = _groups(adapter.claims)
    rslora = all(isinstance(c.method, LoRA) and c.method.use_rslora for group in groups.values() for c in group)
    sizes: dict[str, tuple[int, float]] = {}
    for group in groups.values():
        place = group[0].place
        path = place.path.partition("[")[0] if _is_stack(place) else _attention(place) or place.owner_path
        size = _size(group, rslora)
        if sizes.setdefault(path, size) != size:
            raise NotInPEFT(f"PEFT adapts in_proj_weight and out_proj of {path} with one rank and one alpha")
    stacks = {path for path in sizes if path in groups}
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
        "target_modules": target_modules(adapter.model, set(sizes) - stacks),
        **({"target_parameters": sorted(stacks)} if stacks else {}),
        "use_dora": isinstance(lora, DoRA),
        "use_rslora": rslora,
    }


def _groups(claims: Sequence[Claim]) -> dict[str, list[Claim]]:
    """LoRA claims by the weight they change, in order; refuses what PEFT's LoRA cannot hold."""
    groups: dict[str, list[Claim]] = {}
    for claim in claims:
        if isinstance(claim.method, LoRA):
            groups.setdefault(f"{claim.place.owner_path}.{claim.place.parameter}", []).append(claim)
        elif not isinstance(claim.method, FullFineTuning):
            raise NotInPEFT(f"{type(claim.method).__name__} is no method that PEFT's LoRA files can hold")
        if isinstance(claim.method, DoRA) and (claim.place.spans or _attention(claim.place)):
            raise NotInPEFT("PEFT has no DoRA on a role of a fused projection, or on nn.MultiheadAttention")
    if not groups:
        raise NotInPEFT("PEFT's files hold trained modules only beside a method such as LoRA")
    dora = [any(isinstance(c.method, DoRA) for c in group) for group in groups.values()]
    if any(dora) and (not all(dora) or any(len(group) > 1 for group in groups.values())):
        raise NotInPEFT("PEFT has no DoRA beside LoRA, and none stacked")
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


def _is_stack(place: Place) -> bool:
    return place.format.rows == 1


def _rows(place: Place, B: Tensor) -> Tensor:
    """The rows of the module's B that belong to this place."""
    return row_index(place.spans or ((0, B.shape[place.format.rows]),), B.device)


def _factors(place: Place, groups: Mapping[str, Any], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B of the module, a stack's in Veneer's shapes."""
    A, B = (tensors[key] for key in _keys(place, groups))
    if _is_stack(place):
        A, B = A.unflatten(0, (place.shape[0], -1)), B.unflatten(1, (-1, place.shape[0])).permute(2, 0, 1)
    return A, B


def _parts(group: Sequence[Claim]) -> list[tuple[Tensor, Tensor, float, int]]:
    """(A, B, sign, rank) of every product; a start that is subtracted is one of its own."""
    dim = group[0].place.format.rows
    return [(A, B, sign, A.shape[dim]) for claim in group for A, B, sign in _pair(claim).parts()]


def _joint(parts: list[Tensor], dim: int) -> Tensor:
    """The parts joined; a single one as it is, so that what is copied into it is in the adapter."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _joined(group: Sequence[Claim]) -> Tensor:
    place, dim = group[0].place, group[0].place.format.rows
    if len(group) == 1 and place.spans is None:
        return _joint([B.detach() if sign == 1.0 else B.detach() * sign for _, B, sign, _ in _parts(group)], dim + 1)
    shape = place.format.shape(place.owner, place.parameter)[: dim + 1]
    joined = _pair(group[0]).B.new_zeros(*shape, sum(rank for *_, rank in _parts(group)))
    start = 0
    for claim in group:
        for _, B, sign, rank in _parts([claim]):
            joined.narrow(dim + 1, start, rank).index_copy_(dim, _rows(claim.place, joined), B.detach() * sign)
            start += rank
    return joined


def _size(group: Sequence[Claim], rslora: bool) -> tuple[int, float]:
    """Rank and alpha that give the group's scale."""
    rank = sum(rank for *_, rank in _parts(group))
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


def _keys(place: Place, groups: Mapping[str, Any]) -> tuple[str, str]:
    if place.functional and place.parameter not in ("in_proj_weight", "weight") and not _is_stack(place):
        raise NotInPEFT(f"PEFT has no LoRA on {place.path}")
    names = _wrapped(place, groups)
    stem = _stem(place) + ".base_layer" * (len(names) - 1 - names.index(place.parameter))
    if isinstance(place.owner, nn.Embedding):
        return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _magnitude_key(place: Place) -> str:
    return f"{_stem(place)}.lora_magnitude_vector"


def _magnitude_shape(place: Place) -> tuple[int, ...]:
    return (place.shape[0],) if len(place.shape) == 2 else (1, place.shape[0], *[1] * (len(place.shape) - 2))


def _wrapped(place: Place, groups: Mapping[str, Any]) -> list[str]:
    """The adapted parameters of the place's module, in PEFT's order of wrapping: the last is outermost."""
    return [name for name in place.owner._parameters if f"{place.owner_path}.{name}" in groups]


def _whole_key(place: Place, groups: Mapping[str, Any]) -> str:
    """PEFT's key of a parameter trained whole: below a `base_layer` for each time that LoRA wraps its module."""
    wraps = len(_wrapped(place, groups))
    if wraps:
        return f"{_stem(place)}{'.base_layer' * wraps}.{place.parameter}"
    if place.parameter == "in_proj_bias" and f"{place.owner_path}.out_proj.weight" in groups:
        raise NotInPEFT("PEFT does not save the in_proj_bias of an nn.MultiheadAttention that it adapts")
    return f"{PREFIX}{place.owner_path}.{place.parameter}"


__all__ = ["METHODS", "from_config", "from_tensors", "to_config", "to_tensors"]
