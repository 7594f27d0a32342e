"""What scales another delta by a learned gate."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.delta import After, Delta, KeyValue, Place
from veneer.errors import MethodError
from veneer.layers import Matrix


def gated(inner: Delta, place: Place) -> Delta:
    """The delta behind a gate; MethodError where it changes no vectors of tokens."""
    if isinstance(inner, KeyValue):
        if inner.apart:
            raise MethodError("what is attended apart has a gate of its own. Use it without another.")
        return GatedKeyValue(inner, place)
    if not isinstance(inner, After):
        raise MethodError("the method inside changes no output here, which a gate could scale. Use it without a gate.")
    if place.unit == "weight" and not isinstance(place.map, Matrix):
        raise MethodError("a gate reads vectors, and this layer is given none. Leave the layer out of `where`.")
    return GatedAfter(inner, place)


class Gate(Delta):
    """A delta inside, which trains what it trained."""

    def __init__(self, inner: Delta) -> None:
        super().__init__()
        self.inner = inner
        self.reads = inner.reads
        vars(self)["fast"] = frozenset(f"inner.{name}" for name in inner.fast)

    def trains(self, name: str) -> bool:
        return not name.startswith("inner.") or self.inner.trains(name.removeprefix("inner."))

    def around(self, inner: Delta) -> Gate:
        """The same gate on another delta."""
        twin = copy.copy(self)
        vars(twin)["_modules"] = {"inner": inner}
        return twin


class GatedAfter(Gate, After):
    """y + sigmoid(w·h + b)·(inner(x, y) - y); h is y where that is what the inner delta reads."""

    def __init__(self, inner: Delta, place: Place) -> None:
        super().__init__(inner)
        self.serial = place.unit == "sublayer" and not inner.reads
        self.weight = nn.Parameter(torch.zeros(1, place.shape[-1], **place.new))
        self.bias = nn.Parameter(torch.zeros(1, **place.new))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = (y if self.serial else x).to(y.dtype)
        gate = torch.sigmoid(F.linear(h, self.weight.to(y.dtype), self.bias.to(y.dtype)))
        change: Tensor = self.inner(x, y) - y
        return y + gate * change


class GatedKeyValue(Gate, KeyValue):
    """sigmoid(b) times what the inner delta puts in front; without any, as far from k and v as that says."""

    def __init__(self, inner: KeyValue, place: Place) -> None:
        super().__init__(inner)
        self.position_offset = inner.position_offset
        self.bias = nn.Parameter(torch.zeros(1, **place.new))

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        new_k, new_v = self.inner(k, v)
        gate = torch.sigmoid(self.bias).to(k.dtype)
        return _scaled(gate, k, new_k), _scaled(gate, v, new_v)


def _scaled(gate: Tensor, own: Tensor, new: Tensor) -> Tensor:
    front = new.shape[2] - own.shape[2]
    if not front:
        return own + gate * (new - own)
    return torch.cat([gate * new[:, :, :front], new[:, :, front:]], dim=2)
