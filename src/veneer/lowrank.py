"""The low-rank pair that LoRA and its kin share: A projects a layer's input down to `rank`, B projects it up.

Where the layer is called, the pair runs beside it on activations and W' is never formed. Where its weight is read
functionally, the change s·B·A is added to the weight as it is read.

Adapter weights are kept in float32 and cast to the dtype of the activations for the product: that reads the activations
as they are and keeps no float32 copy of them for backward; matrix products accumulate in float32 all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from veneer.delta import After, Delta, Place, Weight, compute_dtype


class Pair(Delta):
    """A [rank, in, *kernel], random, and B [out, rank, *1], zero, with their scale s; for each matrix of a stack."""

    mergeable = True
    fast = frozenset({"B"})

    def __init__(self, place: Place, rank: int, scale: float, init: str) -> None:
        super().__init__()
        assert place.map is not None
        self.map = place.map
        self.rank = rank
        self.scale = scale
        dtype, device = compute_dtype(place.weight.dtype), place.weight.device
        a, b = self.map.factors(place.shape, rank)
        self.A = nn.Parameter(torch.empty(a, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(b, dtype=dtype, device=device))
        for matrix in self.map.matrices(self.A.data):
            _start(matrix, init, self.map.fan_in(place.shape))

    def merge(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.map.product(self.A.to(weight.dtype), self.B.to(weight.dtype))


class Beside(Pair, After):
    """y + B(s·A(dropout(x)))."""

    def __init__(self, place: Place, rank: int, scale: float, init: str, dropout: float) -> None:
        super().__init__(place, rank, scale, init)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            x = self.dropout(x.to(y.dtype))
        h = self.map.down(x, self.A.to(y.dtype))
        return y + self.map.up(h * self.scale, self.B.to(y.dtype))


class Inside(Pair, Weight):
    """w + s·B·A."""

    def forward(self, w: Tensor) -> Tensor:
        return self.merge(w)


def _start(A: Tensor, init: str, fan_in: int) -> None:
    """Fill A so that A·x starts with entries of the same spread at every width (orthogonal: exactly)."""
    if init == "kaiming":
        bound = 1 / math.sqrt(fan_in)
        nn.init.uniform_(A, -bound, bound)
    elif init == "gaussian":
        nn.init.normal_(A, std=1 / len(A))
    else:
        nn.init.orthogonal_(A)


class Projections(nn.Module):
    """A [rank, widest in] and B [widest out, rank], random and frozen; every layer takes the corner it needs."""

    def __init__(self, places: Sequence[Place], rank: int, seed: int) -> None:
        super().__init__()
        new = places[0].new
        generator = None if new["device"].type == "meta" else torch.Generator(new["device"]).manual_seed(seed)
        for name, shape in (
            ("A", (rank, max(place.shape[1] for place in places))),
            ("B", (max(place.shape[0] for place in places), rank)),
        ):
            bound = math.sqrt(6 / shape[1])  # Kaiming's, for a ReLU
            self.register_buffer(name, torch.empty(shape, **new).uniform_(-bound, bound, generator=generator))
