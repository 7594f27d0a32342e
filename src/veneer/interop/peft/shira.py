"""PEFT's SHIRA files, which hold the random places beside the values."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.delta import Method
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import Entry
from veneer.interop.peft.plain import Plain, refuse_other_layers, refuse_others, single
from veneer.methods import SHiRA


class _SHiRA(Plain):
    METHODS: tuple[type[Method], ...] = (SHiRA,)
    fields = frozenset({"r", "random_seed", "mask_type", "bias"})
    known = ("shira_weight", "shira_indices")

    def endings(self, claim: Claim) -> dict[str, tuple[str, tuple[int, ...]]]:
        refuse_other_layers(claim.place, conv1d=False)
        count = claim.delta.get_parameter("values").numel()
        return {"values": ("shira_weight", (count,)), "indices": ("shira_indices", (2, count))}

    def options(self, adapter: Adapter) -> dict[str, Any]:
        method: SHiRA = single(adapter.claims, SHiRA)
        return {
            "init_weights": True,
            "mask_type": "random",
            "peft_type": "SHIRA",
            "r": method.rank,
            "random_seed": method.seed,
        }

    def entries(self, model: nn.Module, config: dict[str, Any], modules: dict[str, set[str]], file: str) -> list[Entry]:
        refuse_others(config, {"bias": ("none",)})
        method = SHiRA(rank=config["r"], seed=config.get("random_seed"))
        return [Entry(method, "target_modules", [(path, None) for path in modules])]


KIND = _SHiRA()
