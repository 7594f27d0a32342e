"""Positions of an adapter's own in front of an attention's keys and values: what prefixes are made of.

The keys are used as they are, without rotation, and the base's tokens keep their positions: no part of the context
window is lost, and caches hold the base's own keys only. With a position offset they start further on, as if the slots
were tokens before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.delta import KeyValue, Place


class Slots(KeyValue):
    """Trained keys [kv_heads, length, key width] and values [kv_heads, length, value width]."""

    def __init__(self, key: Tensor, value: Tensor, position_offset: int = 0) -> None:
        super().__init__()
        self.position_offset = position_offset
        self.key = nn.Parameter(key)
        self.value = nn.Parameter(value)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return in_front(self.key, k), in_front(self.value, v)


class MLPSlots(KeyValue):
    """Keys and values that one network, shared by all places, makes for this place while they are trained."""

    shared: PrefixMLP

    def __init__(self, place: Place, position_offset: int = 0) -> None:
        super().__init__()
        self.position_offset = position_offset
        self.path, self.shape = place.path, place.shape
        self.borrow(shared=place.shared)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.computed()
        return in_front(key, k), in_front(value, v)

    def computed(self) -> tuple[Tensor, Tensor]:
        """What the network makes now."""
        heads, key_width, _ = self.shape
        both: Tensor = self.shared(self.path).unflatten(-1, (heads, -1)).transpose(0, 1)
        return both[..., :key_width], both[..., key_width:]

    @torch.no_grad()
    def folded(self) -> Slots:
        """The same keys and values without the network."""
        key, value = self.computed()
        return Slots(key.contiguous(), value.contiguous(), self.position_offset)


class PrefixMLP(nn.Module):
    """MLP(E): from one vector a position, the keys and values of that position at every place."""

    def __init__(self, places: Sequence[Place], length: int, width: int, hidden: int) -> None:
        super().__init__()
        new = places[0].new
        sizes = [place.shape[0] * (place.shape[1] + place.shape[2]) for place in places]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.spans = {p.path: (end - size, end) for p, size, end in zip(places, sizes, ends, strict=True)}
        self.embedding = nn.Parameter(torch.randn(length, width, **new))
        self.inner = nn.Linear(width, hidden, **new)
        self.outer = nn.Linear(hidden, ends[-1], **new)

    def forward(self, path: str) -> Tensor:
        """[length, heads · (key width + value width)] of one place: its rows of the last layer only."""
        rows = slice(*self.spans[path])
        hidden = torch.tanh(self.inner(self.embedding))
        return F.linear(hidden, self.outer.weight[rows], self.outer.bias[rows])


def in_front(slots: Tensor, own: Tensor) -> Tensor:
    """`slots` [heads, length, width] in front of `own` [batch, heads, length, width]."""
    return torch.cat([slots.to(own).expand(len(own), -1, -1, -1), own], dim=2)
