"""PEFT's TRAINABLE_TOKENS files: the trained rows of an embedding, once for each module that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from veneer.delta import Method
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import Entry, NotInPEFT
from veneer.interop.peft.plain import Plain, single
from veneer.methods import FullFineTuning, TrainableTokens


class _TrainableTokens(Plain):
    METHODS: tuple[type[Method], ...] = (TrainableTokens,)
    fields = frozenset({"token_indices"})
    known = ("trainable_tokens_delta",)

    def endings(self, claim: Claim) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"value": ("trainable_tokens_delta", tuple(claim.delta.get_parameter("value").shape))}

    def to_tensors(self, claims: Sequence[Claim]) -> dict[str, Tensor]:
        if any(isinstance(claim.method, FullFineTuning) for claim in claims):
            raise NotInPEFT("PEFT trains no module whole beside tokens")
        return super().to_tensors(claims)

    def to_config(self, adapter: Adapter) -> dict[str, Any]:
        return {key: value for key, value in super().to_config(adapter).items() if key != "modules_to_save"}

    def options(self, adapter: Adapter) -> dict[str, Any]:
        tokens = list(single(adapter.claims, TrainableTokens).tokens)
        return {"peft_type": "TRAINABLE_TOKENS", "token_indices": tokens}

    def entries(self, model: nn.Module, config: dict[str, Any], modules: dict[str, set[str]], file: str) -> list[Entry]:
        method = TrainableTokens(config["token_indices"])
        return [Entry(method, "target_modules", [(path, None) for path in modules])]


KIND = _TrainableTokens()
