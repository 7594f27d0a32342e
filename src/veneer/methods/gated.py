"""Gates: how much of another method acts, learned at each place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import InstanceOf
from torch import Tensor, nn

from veneer.delta import Delta, Method, Place
from veneer.gates import Gate, gated


@dataclass(frozen=True)
class Gated(Method):
    """A gate on another method: each place learns how much of it acts. UniPELT is three gated methods on one model.

    Formula:
        y' = y + g·(D(x, y) - y), g = sigmoid(w·h + b) for each token, where D is the method's delta and h is what it
        reads. Keys and values in front of an attention's own: [g·P_K; K], [g·P_V; V], with g = sigmoid(b).

        The paper's code takes the mean of g over the tokens, padding included. Then later tokens change earlier ones,
        and a text generated with a cache is another than without; so each token has its own gate here, and a prefix,
        which all tokens share, one that depends on none.

    Shapes:
        w [1, width of h] and b [1], beside the method's own; a prefix has b only.

    Defaults:
        method: the method inside. w and b start at zero, so g at one half; what changes nothing still does not.

    Cost:
        width + 1 parameters a place beyond the method's; a dot product a token.

    Merging:
        None: the gate depends on the token.

    Errors:
        MethodError where the method inside changes inputs, weights or embeddings, or the layer reads ids or pixels.

    Paper:
        Mao et al., "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", ACL 2022,
        arXiv:2110.07577.
    Example:
        veneer.attach(model, veneer.Gated(veneer.LoRA(rank=8)), where="attention.q | attention.v")
    """

    method: InstanceOf[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        vars(self).update(unit=self.method.unit, default_where=self.method.default_where)

    def build(self, place: Place) -> Delta:
        return gated(self.method.build(place), place)

    def select(self, places: Sequence[Place]) -> Sequence[Place]:
        return self.method.select(places)

    def share(self, places: Sequence[Place]) -> nn.Module | None:
        return self.method.share(places)

    def folded(self, delta: Delta) -> tuple[Method, Delta]:
        assert isinstance(delta, Gate)
        method, inner = self.method.folded(delta.inner)
        return (self, delta) if inner is delta.inner else (Gated(method), delta.around(inner))

    def penalty(self, deltas: Sequence[Delta]) -> Tensor | None:
        return self.method.penalty([delta.inner for delta in deltas if isinstance(delta, Gate)])

    def after_step(self, deltas: Sequence[Delta], step: int) -> None:
        self.method.after_step([delta.inner for delta in deltas if isinstance(delta, Gate)], step)

    def check(self, places: Sequence[Place]) -> None:
        self.method.check(places)

    def companions(self, places: Sequence[Place]) -> Iterable[tuple[str, Method]]:
        return self.method.companions(places)
