"""Invertible adapters: a trained invertible map behind the token embeddings, undone before the tied head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from veneer.bottleneck import Activation, Coupling, width_of
from veneer.delta import After, Before, Delta, Method, Place
from veneer.errors import MethodError


class Behind(After):
    """The embeddings through the map."""

    coupling: Coupling

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        changed: Tensor = self.coupling(y)
        return changed


class Undone(Before):
    """The head's input through the map's inverse."""

    coupling: Coupling

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.coupling(x, inverse=True)
        return changed


@dataclass(frozen=True)
class InvertibleAdapter(Method):
    """A trained invertible map of the token embeddings, undone before a head that is tied to them: for a new language.

    Formula:
        e = [a, b]; a' = a + F(b), b' = b + G(a') behind the embedding; before the head b = b' - G(a'), a = a' - F(b).
        F and G are bottlenecks: up · f(down · z + b) + c.

    Shapes:
        of F and of G: down [width, d/2], b [width], up [d/2, width], c [d/2] at embeddings of width d.

    Defaults:
        reduction_factor: d/2 over the width of F and G.
        activation: f: "relu", "gelu", "silu", "tanh" or "leaky_relu".

        up starts at zero, so the map at the identity. where="embedding" leaves out the inverse, for models without a
        head over the vocabulary. Stacked ones are undone in the order of attaching: let one act at a time.

    Cost:
        2 · (width·d + width + d/2) parameters in all: 296,064 at 768 dimensions.

    Merging:
        None: the map acts on activations. Keep it attached.

    Errors:
        MethodError for embeddings of odd or several widths, or a head that is not tied to them.

    Paper:
        Pfeiffer et al., "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer", EMNLP 2020,
        arXiv:2005.00052; the coupling: Dinh et al., "NICE", arXiv:1410.8516.
    Example:
        language = {"embedding | head": veneer.InvertibleAdapter(), "mlp": veneer.BottleneckAdapter.pfeiffer()}
        veneer.attach(model, language, name="quechua")
    """

    reduction_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    activation: Activation = "relu"
    default_where: ClassVar[str] = "embedding | head"

    def share(self, places: Sequence[Place]) -> nn.Module | None:
        self.check(places)
        half = dataclasses.replace(places[0], shape=(_width(places[0]) // 2,))
        return Coupling(half, width_of(half, None, self.reduction_factor, self.reduction_factor), self.activation)

    def check(self, places: Sequence[Place]) -> None:
        tables = {id(place.weight) for place in places if isinstance(place.owner, nn.Embedding)}
        widths = {_width(place) for place in places}
        if len(widths) > 1 or any(width % 2 for width in widths):
            raise MethodError(
                f"InvertibleAdapter needs one even width, and finds {sorted(widths)}. Name one embedding."
            )
        if loose := [place.path for place in places if id(place.weight) not in tables]:
            raise MethodError(f"{loose[0]} is not tied to an embedding here. Use where='embedding'.")

    def build(self, place: Place) -> Delta:
        delta = Behind() if isinstance(place.owner, nn.Embedding) else Undone()
        delta.borrow(coupling=place.shared)
        return delta


def _width(place: Place) -> int:
    return place.shape[0 if isinstance(place.owner, nn.Embedding) else 1]
