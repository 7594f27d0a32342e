"""VeRA: one frozen random pair for all layers, and two trained vectors for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from veneer.delta import Delta, Method, Place
from veneer.errors import MethodError
from veneer.lowrank import BesideShared, InsideShared, Projections


@dataclass(frozen=True)
class VeRA(Method):
    """Vector-based random matrix adaptation: LoRA's A and B are random, frozen and shared; two vectors are trained.

    Formula:
        W' = W + diag(b) · B · diag(d) · A

    Shapes:
        A [rank, widest in], B [widest out, rank], of which a layer takes the part it needs; d [rank], b [out].

    Defaults:
        rank: width of the product.
        d_initial: what d starts with; b starts with zero.
        dropout: probability of dropping an input of A while training.
        seed: of A and B.
        save_projection: save A and B too, rather than draw them again from the seed.

    Cost:
        rank + out trained parameters a layer. No cost at inference once merged.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        MethodError for a layer that is no matrix (embedding, convolution), or dropout on a weight read functionally.

    Paper:
        Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024, arXiv:2310.11454.
    Example:
        veneer.attach(model, veneer.VeRA(rank=256), where="attention.q | attention.v")
    """

    rank: Annotated[int, Field(ge=1)] = 256
    d_initial: Annotated[float, Field(allow_inf_nan=False)] = 0.1
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    seed: int = 0
    save_projection: bool = True
    learning_rate: ClassVar[float] = 5e-3

    def share(self, places: Sequence[Place]) -> nn.Module:
        for place in places:
            if len(place.shape) != 2 or isinstance(place.owner, nn.Embedding):
                raise MethodError(
                    f"VeRA at {place.path}: only linear layers can share A and B. Leave it out of `where`."
                )
        return Projections(places, self.rank, self.seed, self.save_projection)

    def build(self, place: Place) -> Delta:
        if not place.functional:
            return BesideShared(place, self.rank, self.d_initial, self.dropout)
        if self.dropout:
            raise MethodError("The weight is read without a call that VeRA could drop inputs of. Set dropout=0.0.")
        return InsideShared(place, self.rank, self.d_initial, 0.0)
