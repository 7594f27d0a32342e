"""LoRA-FA: LoRA whose down projection stays as it was drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from veneer.lowrank import Beside, Inside
from veneer.methods.lora import LoRA


class _Beside(Beside):
    still = frozenset({"A"})  # and autograd keeps no input of a layer: only what A makes of it


class _Inside(Inside):
    still = frozenset({"A"})


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA with a frozen A: half the trained parameters, and no layer's input has to be kept for backward.

    Formula:
        W' = W + (alpha / rank) · B·A, or (alpha / sqrt(rank)) · B·A with use_rslora. A is drawn once, B is trained.

    Shapes:
        A [rank, in], B [out, rank]; a convolution's A is [rank, in, *kernel]; an embedding's `in` is its vocabulary.

    Defaults:
        rank: width of the product.
        alpha: numerator of the scale.
        dropout: probability of dropping an input of A while training.
        use_rslora: scale by alpha / sqrt(rank), which keeps high ranks learning.
        init: of A: "kaiming" (uniform within 1/sqrt(fan in)), "gaussian" (std 1/rank) or "orthogonal"; B is zero.
        bias: base biases trained as well: "none", "lora_only" (of the adapted layers) or "all".
        rank_pattern: other ranks, by glob or `re:` regex over module paths; the first match holds.
        alpha_pattern: other alphas, likewise.

    Cost:
        rank · out trained parameters a layer; keeps `rank` numbers a token for backward where LoRA keeps in + rank.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        MethodError as for LoRA.

    Paper:
        Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
        arXiv:2308.03303.
    Example:
        veneer.attach(model, veneer.LoRAFA(rank=8, alpha=16.0), where="linear")
    """

    beside: ClassVar[type[Beside]] = _Beside
    inside: ClassVar[type[Inside]] = _Inside
