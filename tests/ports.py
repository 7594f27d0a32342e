"""One small method for each port that no shipped method uses yet, so that the laws hold the mechanism to all five."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import veneer
from veneer.delta import compute_dtype


class _Scale(veneer.Before):
    def __init__(self, place: veneer.Place) -> None:
        super().__init__()
        dtype = compute_dtype(place.weight.dtype)
        self.scale = nn.Parameter(torch.ones(place.shape[1], dtype=dtype, device=place.weight.device))

    def forward(self, x):
        return x * self.scale.to(x.dtype)


@dataclass(frozen=True)
class InputScale(veneer.Method):
    """base(x) becomes base(x * s)."""

    default_where = "mlp.down"

    def build(self, place):
        return _Scale(place)


class _Shift(veneer.Input):
    def __init__(self, place: veneer.Place) -> None:
        super().__init__()
        dtype = compute_dtype(place.weight.dtype)
        self.shift = nn.Parameter(torch.zeros(place.shape[0], dtype=dtype, device=place.weight.device))

    def forward(self, ids, embeddings):
        return embeddings + self.shift.to(embeddings.dtype) * (ids % 2).unsqueeze(-1)


@dataclass(frozen=True)
class EmbeddingShift(veneer.Method):
    """The embeddings of odd ids move by a trained vector."""

    unit = "input"
    default_where = "embedding"

    def build(self, place):
        return _Shift(place)


class _Slots(veneer.KeyValue):
    def __init__(self, place: veneer.Place, length: int) -> None:
        super().__init__()
        heads, key_width, value_width = place.shape
        dtype = compute_dtype(place.weight.dtype)
        self.k = nn.Parameter(torch.randn(heads, length, key_width, dtype=dtype, device=place.weight.device))
        self.v = nn.Parameter(torch.randn(heads, length, value_width, dtype=dtype, device=place.weight.device))

    def forward(self, k, v):
        return self._before(self.k, k), self._before(self.v, v)

    @staticmethod
    def _before(slots, own):
        return torch.cat([slots.to(own.dtype).expand(len(own), -1, -1, -1), own], dim=2)


@dataclass(frozen=True)
class KeySlots(veneer.Method):
    """Trained keys and values in front of every attention's own."""

    length: int = 3
    unit = "attention"
    default_where = "attention"

    def build(self, place):
        return _Slots(place, self.length)
