"""VeRA: one frozen random pair of matrices for all layers, and two trained vectors a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from veneer.delta import After, Delta, Method, Place, Weight
from veneer.errors import MethodError
from veneer.lowrank import Projections


class _Scaled(Delta):
    """d [rank] and b [out] around the shared projections."""

    mergeable = True

    def __init__(self, place: Place, rank: int, dropout: float) -> None:
        super().__init__()
        assert place.map is not None
        self.map, self.shape = place.map, place.shape
        self.dropout = nn.Dropout(dropout)
        self.d = nn.Parameter(torch.full((rank,), 0.1, **place.new))
        self.b = nn.Parameter(torch.zeros(place.shape[0], **place.new))
        self.borrow(shared=place.shared)

    def corners(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A and B for a layer of this shape."""
        shared: Any = self.shared
        return shared.A[:, : self.shape[1]].to(like), shared.B[: self.shape[0]].to(like)

    def merge(self, weight: Tensor) -> Tensor:
        a, b = self.corners(weight)
        return weight + self.b.to(weight.dtype).unsqueeze(1) * ((b * self.d.to(weight.dtype)) @ a)


class _Beside(_Scaled, After):
    """y + b · B(d · A(dropout(x)))."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.corners(y)
        x = self.dropout(x.to(y.dtype)) if x.is_floating_point() else x
        return y + self.b.to(y.dtype) * self.map.up(self.map.down(x, a) * self.d.to(y.dtype), b)


class _Inside(_Scaled, Weight):
    """w + b · B·(d · A)."""

    def forward(self, w: Tensor) -> Tensor:
        return self.merge(w)


@dataclass(frozen=True)
class VeRA(Method):
    """Vector-based random matrix adaptation: frozen random projections shared by all layers, scaled by trained vectors.

    Formula:
        W' = W + diag(b)·B·diag(d)·A, with A and B random, frozen and common to all layers.

    Shapes:
        d [rank], b [out]; A [rank, widest in], B [widest out, rank], of which a layer takes its corner.

    Defaults:
        rank: of the shared projections; it may be high, because they are not trained.
        dropout: probability of dropping an input of A while training.
        seed: of the random projections.

    Cost:
        rank + out trained parameters a layer; the projections are saved once. Nothing at inference once merged.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        MethodError on a convolution, and for dropout on a weight that is read functionally.

    Paper:
        Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024, arXiv:2310.11454.

    Example:
        veneer.attach(model, veneer.VeRA(rank=256))
    """

    rank: Annotated[int, Field(ge=1)] = 256
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    seed: int = 0

    def share(self, places: Sequence[Place]) -> nn.Module:
        return Projections([place for place in places if len(place.shape) == 2] or places, self.rank, self.seed)

    def build(self, place: Place) -> Delta:
        if len(place.shape) != 2:
            raise MethodError("VeRA needs a weight of two dimensions, and this one has more. Attach LoRA there.")
        if place.functional and self.dropout:
            raise MethodError("The weight is read without a call that VeRA could drop inputs of. Set dropout=0.0.")
        return (_Inside if place.functional else _Beside)(place, self.rank, self.dropout)
