"""LoRA: a trained low-rank change beside every frozen weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from veneer import pairs
from veneer.delta import Delta, Method, Place
from veneer.errors import MethodError
from veneer.lowrank import Beside, Inside
from veneer.methods.full import FullFineTuning

Rank = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation: the frozen weight plus a trained product of two thin matrices.

    Formula:
        W' = W + (alpha / rank) · B·A, or (alpha / sqrt(rank)) · B·A with use_rslora. A projects down, B up.

    Shapes:
        A [rank, in], B [out, rank]; a convolution's A is [rank, in, *kernel]; an embedding's `in` is its vocabulary.

    Defaults:
        rank: width of the product.
        alpha: numerator of the scale.
        dropout: probability of dropping an input of A while training.
        use_rslora: scale by alpha / sqrt(rank), which keeps high ranks learning.
        init: of A: "kaiming" (uniform within 1/sqrt(fan in)), "gaussian" (std 1/rank), "orthogonal" or "eva" (main
            directions of the inputs that `veneer.calibrate` shows it); B is zero. Of both: "pissa" (main directions of
            W; "pissa_niter_16" by a quick SVD) or "olora" (QR of W), whose first product is subtracted for good, or
            "loftq" (what quantizing lost: the dense model shown to `veneer.calibrate`, minus W).
        bias: base biases trained as well: "none", "lora_only" (of the adapted layers) or "all".
        rank_pattern: other ranks, by glob or `re:` regex over module paths; the first match holds.
        alpha_pattern: other alphas, likewise.

    Cost:
        rank · (in + out) parameters a layer: 65,536 for rank 8 on 4096 x 4096. No cost at inference once merged.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        MethodError for a value out of range, a pattern or bias option that matches nothing, or dropout on a weight that
        is read functionally (nn.MultiheadAttention).

    Paper:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685; rank-stabilised
        scale: Kalajdzievski, arXiv:2312.03732. Starts: PiSSA, Meng et al., arXiv:2404.02948; OLoRA, Büyükakyüz,
        arXiv:2406.01775; LoftQ, its first step, Li et al., arXiv:2310.08659; EVA, Paischer et al., arXiv:2410.07170.
    Example:
        veneer.attach(model, veneer.LoRA(rank=8, alpha=16.0), where="attention.q | attention.v")
    """

    rank: Rank = 8
    alpha: Finite = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    use_rslora: bool = False
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "loftq", "eva"] = "kaiming"
    bias: Literal["none", "lora_only", "all"] = "none"
    rank_pattern: Mapping[str, Rank] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Finite] = field(default_factory=dict)
    beside: ClassVar[type[Beside]] = Beside
    inside: ClassVar[type[Inside]] = Inside

    def build(self, place: Place) -> Delta:
        rank = place.choose(self.rank_pattern, self.rank)
        alpha = place.choose(self.alpha_pattern, self.alpha)
        scale = alpha / (math.sqrt(rank) if self.use_rslora else rank)
        beside, inside = pairs.deltas(self.init, self.beside, self.inside)
        if not place.functional:
            return beside(place, rank, scale, self.init, self.dropout)
        if self.dropout:
            name = type(self).__name__
            raise MethodError(f"The weight is read without a call that {name} could drop inputs of. Set dropout=0.0.")
        return inside(place, rank, scale, self.init)

    def check(self, places: Sequence[Place]) -> None:
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            if not any(place.matches(pattern) for place in places):
                name = type(self).__name__
                raise MethodError(f"The pattern '{pattern}' matches none of {name}'s {len(places)} places.")
        if self.bias == "lora_only" and not any(place.bias for place in places):
            raise MethodError("bias='lora_only' would train nothing: no adapted layer has a bias. Use bias='none'.")

    def companions(self, places: Sequence[Place]) -> Iterable[tuple[str, Method]]:
        if self.bias == "all":
            yield r"re:(.*\.)?\w*bias", FullFineTuning()
        elif self.bias == "lora_only":
            yield "re:" + "|".join(sorted({re.escape(place.bias) for place in places if place.bias})), FullFineTuning()
