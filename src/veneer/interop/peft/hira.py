"""PEFT's HIRA files, for linear layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.delta import Method
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import Entry
from veneer.interop.peft.plain import Plain, refuse_other_layers, refuse_others, single, transposed
from veneer.methods import HiRA


class _HiRA(Plain):
    METHODS: tuple[type[Method], ...] = (HiRA,)
    fields = frozenset({"r", "hira_dropout", "bias"})
    known = ("hira_A", "hira_B")

    def endings(self, claim: Claim) -> dict[str, tuple[str, tuple[int, ...]]]:
        refuse_other_layers(claim.place)
        return {name: (f"hira_{name}", tuple(claim.delta.get_parameter(name).shape)) for name in "AB"}

    def options(self, adapter: Adapter) -> dict[str, Any]:
        method: HiRA = single(adapter.claims, HiRA)
        return {
            "fan_in_fan_out": transposed(adapter, HiRA),
            "hira_dropout": method.dropout,
            "init_weights": True,
            "peft_type": "HIRA",
            "r": method.rank,
        }

    def entries(self, model: nn.Module, config: dict[str, Any], modules: dict[str, set[str]], file: str) -> list[Entry]:
        refuse_others(config, {"bias": ("none",)})
        method = HiRA(rank=config["r"], dropout=config.get("hira_dropout", 0.0))
        return [Entry(method, "target_modules", [(path, None) for path in modules])]


KIND = _HiRA()
