"""PEFT's LOHA files, for linear layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.delta import Method
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import Entry
from veneer.interop.peft.plain import Plain, refuse_other_layers, refuse_others, single
from veneer.methods import LoHa

NAMES = {"A": "hada_w1_b", "B": "hada_w1_a", "A2": "hada_w2_b", "B2": "hada_w2_a"}


class _LoHa(Plain):
    METHODS: tuple[type[Method], ...] = (LoHa,)
    fields = frozenset({"r", "alpha", "bias", "rank_dropout", "module_dropout", "use_effective_conv2d"})
    known = tuple(NAMES.values())

    def endings(self, claim: Claim) -> dict[str, tuple[str, tuple[int, ...]]]:
        refuse_other_layers(claim.place, conv1d=False)
        return {name: (ending, tuple(claim.delta.get_parameter(name).shape)) for name, ending in NAMES.items()}

    def options(self, adapter: Adapter) -> dict[str, Any]:
        method: LoHa = single(adapter.claims, LoHa)
        return {"alpha": method.alpha, "init_weights": True, "peft_type": "LOHA", "r": method.rank}

    def entries(self, model: nn.Module, config: dict[str, Any], modules: dict[str, set[str]], file: str) -> list[Entry]:
        refuse_others(config, {"bias": ("none",), "rank_dropout": (0,), "module_dropout": (0,)})
        method = LoHa(rank=config["r"], alpha=float(config["alpha"]))
        return [Entry(method, "target_modules", [(path, None) for path in modules])]


KIND = _LoHa()
