"""IA3: three learned vectors a block that scale keys, values and the inner activations of the MLP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.delta import After, Before, Delta, Method, Place
from veneer.errors import MethodError


class _ScaledOutput(After):
    """y · l."""

    mergeable = True
    additive = True

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(place.shape[0], **place.new))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.l.to(y.dtype)

    def merge(self, weight: Tensor) -> Tensor:
        return weight * self.l.to(weight.dtype).unsqueeze(1)

    def merge_bias(self, bias: Tensor) -> Tensor:
        return bias * self.l.to(bias.dtype)


class _ScaledInput(Before):
    """x · l."""

    mergeable = True
    additive = True

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(place.shape[1], **place.new))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.l.to(x.dtype)

    def merge(self, weight: Tensor) -> Tensor:
        return weight * self.l.to(weight.dtype)


@dataclass(frozen=True)
class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations: one trained number a channel.

    Formula:
        k -> l_k · k, v -> l_v · v, and W_down(h) -> W_down(l_ff · h).

    Shapes:
        l has the size of the scaled output, or of the scaled input.

    Defaults:
        feedforward: where inputs are scaled as well, as a `where`; an empty text for nowhere.
        side: what of the layers in `where` is scaled: "output", or "input" (then leave feedforward empty).
        where: the keys and values of self-attention.

    Cost:
        out (or in) parameters a layer. Nothing once merged.

    Merging:
        Rows (or columns) of the weight, and the bias beside scaled rows, are scaled and rounded once.

    Errors:
        MethodError on a convolution, a weight read without a call, embedded ids, or side="input" with feedforward.

    Paper:
        Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS
        2022, arXiv:2205.05638.

    Example:
        veneer.attach(model, veneer.IA3())
    """

    feedforward: str = "mlp.down"
    side: Literal["output", "input"] = "output"
    default_where: ClassVar[str] = "attention.k | attention.v"

    def build(self, place: Place) -> Delta:
        if len(place.shape) != 2 or place.functional:
            raise MethodError("IA3 scales what goes into or comes out of a called matrix. Name other layers.")
        if self.side == "input" and isinstance(place.owner, nn.Embedding):
            raise MethodError("the inputs of an embedding are ids, which cannot be scaled. Use side='output'.")
        return _ScaledOutput(place) if self.side == "output" else _ScaledInput(place)

    def check(self, places: Sequence[Place]) -> None:
        if self.side == "input" and self.feedforward:
            raise MethodError("IA3(side='input') scales the inputs of `where` itself. Set feedforward='' with it.")

    def companions(self, places: Sequence[Place]) -> Iterable[tuple[str, Method]]:
        if self.feedforward:
            yield self.feedforward, IA3(feedforward="", side="input")
