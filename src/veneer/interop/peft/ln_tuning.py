"""PEFT's LN_TUNING files: the parameters of each trained norm below `ln_tuning_layers`."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer import site
from veneer.delta import Method
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import Entry, refuse_incomplete
from veneer.interop.peft.plain import Plain
from veneer.methods import LayerNormTuning


class _LayerNormTuning(Plain):
    METHODS: tuple[type[Method], ...] = (LayerNormTuning,)
    known = ("ln_tuning_layers.weight", "ln_tuning_layers.bias")

    def endings(self, claim: Claim) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"value": (f"ln_tuning_layers.{claim.place.parameter}", claim.place.shape)}

    def options(self, adapter: Adapter) -> dict[str, Any]:
        return {"peft_type": "LN_TUNING"}

    def refuse_incomplete(self, model: nn.Module, config: dict[str, Any], found: set[str], file: str) -> None:
        refuse_incomplete((path for path, _ in site.base_modules(model)), config, found, file)

    def entries(self, model: nn.Module, config: dict[str, Any], modules: dict[str, set[str]], file: str) -> list[Entry]:
        paths = [f"{path}.{end.rpartition('.')[2]}" for path, ends in modules.items() for end in sorted(ends)[::-1]]
        return [Entry(LayerNormTuning(), "target_modules", [(path, None) for path in paths])]


KIND = _LayerNormTuning()
