"""Prefix tuning: trained keys and values in front of those of every attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from veneer.delta import Delta, Method, Place, Unit
from veneer.errors import MethodError
from veneer.slots import MLPSlots, PrefixMLP, Slots

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Trained keys and values that every token attends to, in front of each attention's own.

    Formula:
        attention(Q, [P_K; K], [P_V; V]). With reparameterization (P_K, P_V)[i] = W · tanh(U · E[i] + a) + b, of whose
        last layer each place has its rows; saving folds it away.

    Shapes:
        P_K [kv heads, length, key width], P_V [kv heads, length, value width] at each place; E [length, width of the
        model], U [hidden, width], W [all places' kv heads · (key width + value width), hidden].

    Defaults:
        length: positions in front.
        reparameterization: train through the network; steadier at large learning rates, many more parameters.
        hidden: width of the network.
        std: spread of the normal numbers that P_K and P_V start from; `veneer.start_prefix` starts from real tokens.
        position_offset: where the base's tokens start in a table of learned positions, as in GPT-2 and OPT. PEFT starts
            them at `length`; its file is read and written with that.

    Cost:
        length · kv heads · (key width + value width) parameters a place: 491,520 for length 10 on GPT-2 medium. Every
        attention reads `length` more keys, at inference too; no position of the context is used up. Attentions that a
        model returns have `length` more columns.

    Merging:
        Not possible: it acts on activations.

    Errors:
        MethodError for an option that would change nothing; RoutingError where rows of a batch differ in their offset.

    Paper:
        Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021, arXiv:2101.00190.
    Example:
        veneer.attach(model, veneer.PrefixTuning(length=30))
    """

    length: Count = 30
    reparameterization: bool = False
    hidden: Count = 512
    std: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    position_offset: Annotated[int, Field(ge=0)] = 0
    unit: ClassVar[Unit] = "attention"
    default_where: ClassVar[str] = "attention"
    learning_rate: ClassVar[float] = 5e-3

    def build(self, place: Place) -> Delta:
        offset = self.position_offset if "positions" in place.sources else 0
        if self.reparameterization:
            return MLPSlots(place, offset)
        heads, *widths = place.shape
        key, value = (torch.randn(heads, self.length, width, **place.new) * self.std for width in widths)
        return Slots(key, value, offset)

    def share(self, places: Sequence[Place]) -> nn.Module | None:
        if not self.reparameterization:
            return None
        width = max(place.format.shape(place.owner, place.parameter)[1] for place in places)
        return PrefixMLP(places, self.length, width, self.hidden)

    def folded(self, delta: Delta) -> tuple[Method, Delta]:
        if not isinstance(delta, MLPSlots):
            return self, delta
        return PrefixTuning(self.length, position_offset=self.position_offset), delta.folded()

    def check(self, places: Sequence[Place]) -> None:
        idle, default = ("std", 0.02) if self.reparameterization else ("hidden", 512)
        if vars(self)[idle] != default:
            raise MethodError(
                f"{idle}={vars(self)[idle]} changes nothing with reparameterization={self.reparameterization}. "
                f"Leave {idle} out."
            )
        if self.position_offset and not any("positions" in place.sources for place in places):
            raise MethodError(
                f"position_offset={self.position_offset} moves tokens along a table of learned positions, which a "
                "prefix at the model's first attention does where there is one. Leave position_offset out."
            )
