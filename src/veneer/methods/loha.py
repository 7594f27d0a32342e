"""LoHa: the change is one low-rank product multiplied, entry by entry, by another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from veneer.delta import After, Delta, Method, Place, Unit, Weight
from veneer.lowrank import Pair


class _Products(Pair):
    """A [rank, in] and B [out, rank], both random, beside A2, zero, and B2, random, of the same shapes."""

    fast = frozenset({"B", "B2"})

    def __init__(self, place: Place, rank: int, scale: float) -> None:
        super().__init__(place, rank, scale, "kaiming")
        bound = rank**-0.5
        nn.init.uniform_(self.B, -bound, bound)
        self.A2 = nn.Parameter(self.A.detach() * 0)
        self.B2 = nn.Parameter(self.B.detach().clone().uniform_(-bound, bound))

    def change(self, like: Tensor) -> Tensor:
        """What is added to W, in the dtype of `like`."""
        A, B, A2, B2 = (factor.to(like.dtype) for factor in (self.A, self.B, self.A2, self.B2))
        return self.scale * self.map.product(A, B) * self.map.product(A2, B2)

    def merge(self, weight: Tensor) -> Tensor:
        return weight + self.change(weight)


class _Beside(_Products, After):
    """y + change·x."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.map.down(x.to(y.dtype) if x.is_floating_point() else x, self.change(y))


class _Inside(_Products, Weight):
    """w + change."""

    def forward(self, w: Tensor) -> Tensor:
        return self.merge(w)


@dataclass(frozen=True)
class LoHa(Method):
    """Low-rank Hadamard product (FedPara): a change of rank up to rank² for the parameters of two LoRAs.

    Formula:
        W' = W + (alpha / rank) · (B·A) ⊙ (B2·A2). A, B and B2 start as LoRA's A does, A2 as zero.

    Shapes:
        A, A2 [rank, in], B, B2 [out, rank]; a convolution's A and A2 are [rank, in, *kernel].

    Defaults:
        rank: width of each product.
        alpha: scale of the change, over rank.

    Cost:
        2 · rank · (in + out) parameters a layer. While not merged each layer forms a change as large as its weight, and
        does its product twice. No cost at inference once merged.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        MethodError for a value out of range.

    Paper:
        Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", ICLR
        2022, arXiv:2108.06098.
    Example:
        veneer.attach(model, veneer.LoHa(rank=8), where="attention.q | attention.v")
    """

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    unit: ClassVar[Unit] = "weight"
    learning_rate: ClassVar[float] = 2e-3

    def build(self, place: Place) -> Delta:
        return (_Inside if place.functional else _Beside)(place, self.rank, self.alpha / self.rank)
