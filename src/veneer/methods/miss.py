"""MiSS: one small matrix, shared by all shards of a weight's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from veneer.delta import After, Delta, Method, Place, Unit, Weight
from veneer.errors import MethodError


class _Shards(Delta):
    """D [rank, out], or [rank, mini_rank], zero."""

    mergeable = additive = linear = True

    def __init__(self, place: Place, rank: int, mini_rank: int | None) -> None:
        super().__init__()
        (out, inputs), width = place.shape, mini_rank or place.shape[0]
        if rank > inputs or out % width:
            raise MethodError(f"rank={rank} is above the {inputs} inputs, or {out} outputs are no multiple of {width}.")
        self.rank, self.repeats = rank, out // width
        self.D = nn.Parameter(torch.zeros(rank, width, **place.new))

    def merge(self, weight: Tensor) -> Tensor:
        inputs = weight.shape[1]
        return weight + self.D.to(weight.dtype).T.repeat(self.repeats, -(-inputs // self.rank))[:, :inputs]


class _Beside(_Shards, After):
    """y + D applied to the sum of the shards of dropout(x)."""

    def __init__(self, place: Place, rank: int, mini_rank: int | None, dropout: float) -> None:
        super().__init__(place, rank, mini_rank)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.dropout(F.pad(x.to(y.dtype), (0, -x.shape[-1] % self.rank)))
        h: Tensor = x.unflatten(-1, (-1, self.rank)).sum(-2) @ self.D.to(y.dtype)
        return y + h.repeat(*[1] * (h.dim() - 1), self.repeats)


class _Inside(_Shards, Weight):
    """w with D added to each of its shards."""

    def forward(self, w: Tensor) -> Tensor:
        return self.merge(w)


@dataclass(frozen=True)
class MiSS(Method):
    """Matrix shard sharing: the inputs are cut into shards of `rank`, and one trained matrix is added to every shard.

    Formula:
        W'[:, i] = W[:, i] + D[i mod rank, :]; so y' = y + (sum of the shards of x)·D, which needs one product.

    Shapes:
        D [rank, out]; with mini_rank [rank, mini_rank], repeated along the outputs.

    Defaults:
        rank: width of a shard; the last one may be narrower.
        mini_rank: outputs after which D repeats; None for one row of D an output.
        dropout: probability of dropping an input while training.

    Cost:
        rank · out parameters a layer: 262,144 for rank 64 on 4096 x 4096. No cost at inference once merged.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        MethodError for a value out of range, a layer that is not linear, outputs that are no multiple of mini_rank, or
        dropout on a weight that is read functionally.

    Paper:
        Kang and Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", 2024,
        arXiv:2409.15371. Its variant Bat, which multiplies by W, is left out.
    Example:
        veneer.attach(model, veneer.MiSS(rank=64))
    """

    rank: Annotated[int, Field(ge=1)] = 64
    mini_rank: Annotated[int, Field(ge=1)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    unit: ClassVar[Unit] = "weight"

    def build(self, place: Place) -> Delta:
        if len(place.shape) != 2 or isinstance(place.owner, nn.Embedding):
            raise MethodError("MiSS cuts the inputs of linear layers only. Leave this one out, or attach LoRA there.")
        if not place.functional:
            return _Beside(place, self.rank, self.mini_rank, self.dropout)
        if self.dropout:
            raise MethodError("The weight is read without a call that MiSS could drop inputs of. Set dropout=0.0.")
        return _Inside(place, self.rank, self.mini_rank)
