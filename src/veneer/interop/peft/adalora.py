"""PEFT's ADALORA files.

A file whose `rank_pattern` says which triplets were kept holds only those; Veneer builds each layer with as many. What
was cut while training with Veneer is written as zeros, so that nothing of the training's state is lost.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from veneer.handle import Claim
from veneer.interop.peft.common import NotInPEFT
from veneer.interop.peft.table import Table, is_conv1d, the_one
from veneer.methods import AdaLoRA

_FIELDS = {
    "init_r": "initial_rank",
    "target_r": "target_rank",
    "lora_alpha": "alpha",
    "total_step": "total_steps",
    "tinit": "warmup",
    "tfinal": "final",
    "deltaT": "interval",
    "beta1": "beta_importance",
    "beta2": "beta_uncertainty",
    "orth_reg_weight": "orthogonality",
    "lora_dropout": "dropout",
}


def _write(claims: Sequence[Claim]) -> dict[str, Any]:
    method: AdaLoRA = the_one(claims)
    ranks = {claim.place.owner_path: len(claim.delta.get_parameter("E")) for claim in claims}
    first = method.initial_rank
    if any(rank > first for rank in ranks.values()):
        raise NotInPEFT("PEFT's rank_pattern keeps triplets of the initial rank, and has no more of them")
    kept = {f"{path}.lora_E": [k < rank for k in range(first)] for path, rank in ranks.items() if rank != first}
    fields = {theirs: vars(method)[ours] for theirs, ours in _FIELDS.items()}
    return {**fields, "rank_pattern": kept or None, "init_lora_weights": True, "fan_in_fan_out": is_conv1d(claims)}


def _read(config: dict[str, Any]) -> AdaLoRA:
    kept = dict(config.get("rank_pattern") or {})
    ranks = {f"re:{re.escape(key.rpartition('.')[0])}": sum(map(bool, mask)) for key, mask in kept.items()}
    return AdaLoRA(rank_pattern=ranks, **{ours: config[theirs] for theirs, ours in _FIELDS.items()})


KIND = Table(
    METHODS=(AdaLoRA,),
    tensors={"A": "lora_A", "E": "lora_E", "B": "lora_B"},
    write=_write,
    read=_read,
    known=frozenset({*_FIELDS, "r", "rank_pattern", "init_lora_weights", "qalora_group_size"}),
    only={"bias": ("none",)},
)
