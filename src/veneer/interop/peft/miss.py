"""PEFT's MISS files; its `bat` multiplies by the weight, which Veneer's MiSS does not."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.delta import Method
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import Entry
from veneer.interop.peft.plain import Plain, refuse_other_layers, refuse_others, single
from veneer.methods import MiSS


class _MiSS(Plain):
    METHODS: tuple[type[Method], ...] = (MiSS,)
    fields = frozenset({"r", "mini_r", "miss_dropout", "bias"})
    known = ("miss_block",)

    def endings(self, claim: Claim) -> dict[str, tuple[str, tuple[int, ...]]]:
        refuse_other_layers(claim.place, conv1d=False)
        return {"D": ("miss_block", tuple(claim.delta.get_parameter("D").shape))}

    def options(self, adapter: Adapter) -> dict[str, Any]:
        method: MiSS = single(adapter.claims, MiSS)
        return {
            "bias": "none",
            "init_weights": "mini" if method.mini_rank else True,
            "mini_r": method.mini_rank or 1,
            "miss_dropout": method.dropout,
            "peft_type": "MISS",
            "r": method.rank,
        }

    def entries(self, model: nn.Module, config: dict[str, Any], modules: dict[str, set[str]], file: str) -> list[Entry]:
        refuse_others(config, {"bias": ("none",), "init_weights": (True, False, "mini")})
        mini = config["mini_r"] if config.get("init_weights") == "mini" else None
        method = MiSS(rank=config["r"], mini_rank=mini, dropout=config.get("miss_dropout", 0.0))
        return [Entry(method, "target_modules", [(path, None) for path in modules])]


KIND = _MiSS()
