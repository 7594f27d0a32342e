"""IA3: trained scales on keys, values and the inner activations of the feed-forward layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.delta import After, Before, Delta, Method, Place
from veneer.errors import MethodError


class _Scale(Delta):
    """l, one number for each feature of dimension `side` of the weight."""

    mergeable = True
    linear = True
    side: ClassVar[int]

    def __init__(self, place: Place) -> None:
        super().__init__()
        assert place.map is not None
        self.map = place.map
        self.l = nn.Parameter(torch.ones(place.shape[self.side], **place.new))

    def merge(self, weight: Tensor) -> Tensor:
        return weight * self.l.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1 - self.side))


class _Outputs(_Scale, After):
    side = 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.map.along(self.l.to(y.dtype))

    def merge_bias(self, bias: Tensor) -> Tensor:
        return bias * self.l.to(bias.dtype)


class _Inputs(_Scale, Before):
    side = 1

    def forward(self, x: Tensor) -> Tensor:
        return x * self.map.along(self.l.to(x.dtype))


@dataclass(frozen=True)
class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations: one trained scale for each feature.

    Formula:
        y' = l · y at the places, which are keys and values; y' = base(l · x) at the feed-forward layers.

    Shapes:
        l [out] at a place, l [in] at a feed-forward layer; all ones at first.

    Defaults:
        feedforward: a `where` for the layers whose inputs are scaled besides; the empty string for none.
        inputs: scale the inputs of the places themselves; what `feedforward` stands for.

    Cost:
        in or out parameters a layer: 4,096 for a value of width 4096. No cost at inference once merged.

    Merging:
        Rows of W and of its bias, or columns of W, times l, rounded once to their dtype.

    Errors:
        MethodError where ids would have to be scaled (an embedding's input), for `inputs` together with `feedforward`,
        or for a weight that is read functionally (nn.MultiheadAttention).

    Paper:
        Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS
        2022, arXiv:2205.05638.
    Example:
        veneer.attach(model, veneer.IA3())
    """

    feedforward: str = "mlp.down"
    inputs: bool = False
    default_where: ClassVar[str] = "attention.k | attention.v"
    learning_rate: ClassVar[float] = 5e-3

    def build(self, place: Place) -> Delta:
        if place.functional:
            raise MethodError("The weight is read without a call whose activations IA3 could scale. Leave it out.")
        if self.inputs and isinstance(place.owner, nn.Embedding):
            raise MethodError("An embedding's inputs are ids, which have no scale. Leave it out, or scale its outputs.")
        return _Inputs(place) if self.inputs else _Outputs(place)

    def check(self, places: Sequence[Place]) -> None:
        if self.inputs and self.feedforward:
            raise MethodError("IA3(inputs=True) scales the inputs of its own places. Set feedforward='' beside it.")

    def companions(self, places: Sequence[Place]) -> Iterable[tuple[str, Method]]:
        if self.feedforward:
            yield self.feedforward, IA3(feedforward="", inputs=True)
