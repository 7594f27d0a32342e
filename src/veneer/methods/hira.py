"""HiRA: the weight is multiplied, entry by entry, by a trained low-rank product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from veneer.delta import After, Delta, Method, Place, Unit, Weight
from veneer.errors import MethodError
from veneer.lowrank import Pair


class _Hadamard(Pair):
    """A [rank, in], random, and B [out, rank], zero; they change W by W ⊙ (B·A)."""

    additive, measures = False, True

    def factor(self, weight: Tensor) -> Tensor:
        """What W is multiplied by to get its change."""
        return self.map.product(self.A.to(weight.dtype), self.B.to(weight.dtype))

    def merge(self, weight: Tensor) -> Tensor:
        return weight + weight * self.factor(weight)


class _Beside(_Hadamard, After):
    """y + (W ⊙ B·A)·dropout(x), with W read as it is stored now."""

    def __init__(self, place: Place, rank: int, dropout: float) -> None:
        super().__init__(place, rank, 1.0, "kaiming")
        self.place = place
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            x = self.dropout(x.to(y.dtype))
        weight = self.place.read().to(y.dtype)
        return y + self.map.down(x, weight * self.factor(weight))


class _Inside(_Hadamard, Weight):
    """w + w ⊙ (B·A)."""

    def forward(self, w: Tensor) -> Tensor:
        return self.merge(w)


@dataclass(frozen=True)
class HiRA(Method):
    """Hadamard high-rank adaptation: a low-rank product scales each entry of W, so that the change has a high rank.

    Formula:
        W' = W + W ⊙ (B·A). A starts as LoRA's does, B as zero.

    Shapes:
        A [rank, in], B [out, rank]; a convolution's A is [rank, in, *kernel].

    Defaults:
        rank: width of the product.
        dropout: probability of dropping an input while training.

    Cost:
        rank · (in + out) parameters a layer. While not merged each layer forms a change as large as its weight, and
        does its product twice. No cost at inference once merged.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        MethodError for a value out of range, or dropout on a weight that is read functionally.

    Paper:
        Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR 2025,
        openreview.net/forum?id=TwJrTz9cRS.
    Example:
        veneer.attach(model, veneer.HiRA(rank=32), where="attention.q | attention.v")
    """

    rank: Annotated[int, Field(ge=1)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    unit: ClassVar[Unit] = "weight"

    def build(self, place: Place) -> Delta:
        if not place.functional:
            return _Beside(place, self.rank, self.dropout)
        if self.dropout:
            raise MethodError("The weight is read without a call that HiRA could drop inputs of. Set dropout=0.0.")
        return _Inside(place, self.rank, 1.0, "kaiming")
