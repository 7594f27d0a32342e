"""How far a model's answers move when its weights are stored another way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import MethodError
from veneer.seams.transformers import without_dropout


@dataclass(frozen=True)
class Drift:
    """What changed between two sets of logits over the same positions.

    `largest` and `mean` are of |Δlogit|; `divergence` is the mean KL(before ‖ after) in nats a position; `same_top` the
    share of positions whose largest logit is still the largest.
    """

    largest: float
    mean: float
    divergence: float
    same_top: float
    positions: int

    def __str__(self) -> str:
        return (
            f"logits moved by {self.largest:.2g} at most and {self.mean:.2g} on average, KL {self.divergence:.2g} nats "
            f"a position, the top answer stayed at {self.same_top:.2%} of {self.positions:,} positions"
        )


@torch.no_grad()
def logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's logits [positions, classes] on a batch, without dropout and without what its mask hides.

    Raises MethodError where the model does not answer with logits.
    """
    with without_dropout(model):
        answer = model(**batch)
    if not isinstance(answer, Mapping) or "logits" not in answer:
        raise MethodError(f"{type(model).__name__} does not answer with logits, by which drift is measured.")
    found: Tensor = answer["logits"]
    mask = batch.get("attention_mask")
    return found[mask.bool()] if mask is not None and found.shape[:-1] == mask.shape else found.flatten(0, -2)


def between(before: Tensor, after: Tensor) -> Drift:
    """The drift from one set of logits [positions, classes] to another."""
    moved = (after.float() - before.float()).abs()
    was, now = F.log_softmax(before.double(), -1), F.log_softmax(after.double(), -1)
    return Drift(
        largest=moved.max().item(),
        mean=moved.mean().item(),
        divergence=F.kl_div(now, was, reduction="batchmean", log_target=True).item(),
        same_top=(before.argmax(-1) == after.argmax(-1)).double().mean().item(),
        positions=len(before),
    )
