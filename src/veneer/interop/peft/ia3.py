"""PEFT's IA3 files: `ia3_l` of each module, a column that scales outputs or a row that scales inputs."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.delta import Method
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import Entry, means, names, target_modules
from veneer.interop.peft.plain import Plain, transposed
from veneer.methods import IA3


class _IA3(Plain):
    METHODS: tuple[type[Method], ...] = (IA3,)
    fields = frozenset({"feedforward_modules", "init_ia3_weights"})
    known = ("ia3_l",)
    outside = 1.0

    def endings(self, claim: Claim) -> dict[str, tuple[str, tuple[int, ...]]]:
        assert isinstance(claim.method, IA3)
        (size,) = claim.delta.get_parameter("l").shape
        if len(claim.place.shape) > 2:
            return {"l": ("ia3_l", (1, size, *[1] * (len(claim.place.shape) - 2)))}
        return {"l": ("ia3_l", (1, size) if claim.method.inputs else (size, 1))}

    def options(self, adapter: Adapter) -> dict[str, Any]:
        inputs = {c.place.owner_path for c in adapter.claims if isinstance(c.method, IA3) and c.method.inputs}
        return {
            "fan_in_fan_out": transposed(adapter, IA3),
            "feedforward_modules": target_modules(adapter.model, inputs),
            "init_ia3_weights": True,
            "peft_type": "IA3",
        }

    def entries(self, model: nn.Module, config: dict[str, Any], modules: dict[str, set[str]], file: str) -> list[Entry]:
        field = "feedforward_modules"
        targets = config.get(field)
        targets = targets if isinstance(targets, str) else names(config, field, file)
        inputs = [path for path in modules if means(targets, path, field, file)]
        outputs = [path for path in modules if path not in inputs]
        scaled = [(IA3(feedforward=""), "target_modules", outputs), (IA3(feedforward="", inputs=True), field, inputs)]
        return [Entry(method, where, [(path, None) for path in paths]) for method, where, paths in scaled if paths]


KIND = _IA3()
