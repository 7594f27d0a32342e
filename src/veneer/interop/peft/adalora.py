"""PEFT's ADALORA files.

A file whose `rank_pattern` says which triplets were kept holds only those; Veneer builds each layer with as many. What
was cut while training with Veneer is written as zeros, so that nothing of the training's state is lost.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from veneer.delta import Method
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import Entry, NotInPEFT
from veneer.interop.peft.plain import Plain, refuse_other_layers, refuse_others, single, transposed
from veneer.methods import AdaLoRA

_OPTIONS = {
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


class _AdaLoRA(Plain):
    METHODS: tuple[type[Method], ...] = (AdaLoRA,)
    fields = frozenset(
        {*_OPTIONS, "rank_pattern", "bias", "r", "init_lora_weights", "qalora_group_size", "megatron_core"}
    )
    known = ("lora_A", "lora_B", "lora_E")

    def endings(self, claim: Claim) -> dict[str, tuple[str, tuple[int, ...]]]:
        refuse_other_layers(claim.place)
        return {name: (f"lora_{name}", tuple(claim.delta.get_parameter(name).shape)) for name in "AEB"}

    def options(self, adapter: Adapter) -> dict[str, Any]:
        method: AdaLoRA = single(adapter.claims, AdaLoRA)
        ranks = {claim.place.owner_path: len(claim.delta.get_parameter("E")) for claim in self._own(adapter.claims)}
        first = method.initial_rank
        if any(rank > first for rank in ranks.values()):
            raise NotInPEFT("PEFT's rank_pattern keeps triplets of the initial rank, and has no more of them")
        kept = {f"{path}.lora_E": [k < rank for k in range(first)] for path, rank in ranks.items() if rank != first}
        fields = {theirs: vars(method)[ours] for theirs, ours in _OPTIONS.items()}
        return {
            **fields,
            "bias": "none",
            "fan_in_fan_out": transposed(adapter, AdaLoRA),
            "init_lora_weights": True,
            "peft_type": "ADALORA",
            "rank_pattern": kept or None,
        }

    def entries(self, model: nn.Module, config: dict[str, Any], modules: dict[str, set[str]], file: str) -> list[Entry]:
        refuse_others(config, {"bias": ("none",)})
        kept = dict(config.get("rank_pattern") or {})
        ranks = {f"re:{re.escape(key.rpartition('.')[0])}": sum(map(bool, mask)) for key, mask in kept.items()}
        method = AdaLoRA(rank_pattern=ranks, **{ours: config[theirs] for theirs, ours in _OPTIONS.items()})
        return [Entry(method, "target_modules", [(path, None) for path in modules])]


KIND = _AdaLoRA()
