"""SHiRA: a few entries of each weight are trained, at random places that stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from veneer.delta import After, Delta, Method, Place, Weight
from veneer.errors import MethodError


class _Sparse(Delta):
    """values [n], zero, at rows and columns `indices` [2, n] of the weight, seen as a matrix [out, all the rest]."""

    mergeable = additive = True

    def __init__(self, place: Place, rank: int, seed: int | None) -> None:
        super().__init__()
        assert place.map
        self.map, self.shape = place.map, place.shape
        out, width = place.shape[0], math.prod(place.shape[1:])
        count = rank * (out + width)
        if place.format.rows:
            raise MethodError("SHiRA does not act on stacks of matrices. Leave this one out, or attach LoRA there.")
        if count > out * width:
            raise MethodError(f"rank={rank} means {count} entries of a weight that has {out * width}. Lower the rank.")
        self.register_buffer("indices", torch.zeros(2, count, dtype=torch.int32, device=place.weight.device))
        if not (place.filled or place.weight.is_meta):
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            chosen = torch.randperm(out * width, generator=generator)[:count].sort().values
            self.get_buffer("indices").copy_(torch.stack([chosen // width, chosen % width]))
        self.values = nn.Parameter(torch.zeros(count, **place.new))

    def change(self, dtype: torch.dtype) -> Tensor:
        """The sparse change, written out in the shape of the weight."""
        flat = self.values.new_zeros(self.shape[0], math.prod(self.shape[1:]), dtype=dtype)
        return flat.index_put(tuple(self.get_buffer("indices").long()), self.values.to(dtype)).view(self.shape)

    def verify(self) -> None:
        indices = self.get_buffer("indices").cpu()
        if indices.min() < 0 or indices[0].max() >= self.shape[0] or indices[1].max() >= math.prod(self.shape[1:]):
            raise MethodError(f"has indices outside its weight of shape {self.shape}.")

    def merge(self, weight: Tensor) -> Tensor:
        return weight + self.change(weight.dtype)


class _Beside(_Sparse, After):
    """y + S·x."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.map.down(x.to(y.dtype) if x.is_floating_point() else x, self.change(y.dtype))


class _Inside(_Sparse, Weight):
    def forward(self, w: Tensor) -> Tensor:
        return self.merge(w)


@dataclass(frozen=True)
class SHiRA(Method):
    """Sparse high-rank adaptation: as many entries of each weight as LoRA has numbers, chosen at random, are trained.

    Formula:
        W' = W + S, where S is zero but for rank · (in + out) entries at fixed random places.

    Shapes:
        values [n], indices [2, n] (rows and columns, saved and never trained), n = rank · (in + out).

    Defaults:
        rank: that of the LoRA with as many parameters; the rank of S is not bounded by it.
        seed: of the random places, the same for layers of one shape; None draws them from torch's generator.

    Cost:
        rank · (in + out) parameters a layer. While not merged each layer writes S out and does its product twice.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        MethodError for a value out of range, a stack of matrices, or more entries than the weight has.

    Paper:
        Bhardwaj et al., "Sparse High Rank Adapters", NeurIPS 2024, arXiv:2406.13175; its random mask.
    Example:
        veneer.attach(model, veneer.SHiRA(rank=8, seed=0))
    """

    rank: Annotated[int, Field(ge=1)] = 32
    seed: int | None = None

    def build(self, place: Place) -> Delta:
        return (_Inside if place.functional else _Beside)(place, self.rank, self.seed)
