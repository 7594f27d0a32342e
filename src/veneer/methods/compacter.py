"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products that all places share in part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from veneer.bottleneck import Activation, Beside, Kronecker, Placement, Rules, width_of
from veneer.delta import Delta, Method, Place, Unit
from veneer.errors import MethodError


@dataclass(frozen=True)
class Compacter(Method):
    """Bottleneck adapters made of Kronecker products: small matrices shared by all places, and thin ones of their own.

    Formula:
        y' = y + up · f(down · z + b) + c; down = Σ_i A_i ⊗ (s_i · t_i), up likewise, over `terms` terms with the same
        A_i at every place. z as in BottleneckAdapter.

    Shapes:
        A [terms, terms, terms]; s [terms, out / terms, rank] and t [terms, rank, in / terms] of down [width, d] and of
        up [d, width]; b [width], c [d].

    Defaults:
        width: of the bottleneck; None means d / reduction_factor.
        reduction_factor: d over width, where no width is given.
        terms: how many products are summed; divides d and the width.
        rank: of each s_i · t_i.
        placement: what the adapter reads: "serial", "parallel" or "after_residual".
        activation: f: "relu", "gelu", "silu", "tanh" or "leaky_relu".
        dropout: probability of dropping an entry of what is added while training.

        where="attention | mlp" is the paper's Compacter, the default "mlp" its Compacter++. up's t
        starts at zero, A normal with standard deviation 0.01, the other s and t as Glorot's uniform.

    Cost:
        terms³ parameters in all and 2·rank·(d + width) + width + d a sublayer: 114,112 on T5-base, which with its norms
        is the paper's 0.073%. The matrices are formed at each call.

    Merging:
        None: the nonlinearity has no weight form. Keep it attached.

    Errors:
        MethodError where `terms` does not divide a width, or for width and reduction_factor together.

    Paper:
        Karimi Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", NeurIPS 2021,
        arXiv:2106.04647.
    Example:
        veneer.attach(model, veneer.Compacter(terms=4), where="attention | mlp")
    """

    width: Annotated[int, Field(ge=1)] | None = None
    reduction_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    terms: Annotated[int, Field(ge=1)] = 4
    rank: Annotated[int, Field(ge=1)] = 1
    placement: Placement = "serial"
    activation: Activation = "gelu"
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    unit: ClassVar[Unit] = "sublayer"
    default_where: ClassVar[str] = "mlp"
    learning_rate: ClassVar[float] = 2e-3

    def share(self, places: Sequence[Place]) -> nn.Module | None:
        return Rules(places[0], self.terms)

    def build(self, place: Place) -> Delta:
        width = width_of(place, self.width, self.reduction_factor, type(self).reduction_factor)
        if width % self.terms or place.shape[0] % self.terms:
            raise MethodError(f"terms={self.terms} does not divide both {place.shape[0]} and the width {width}.")
        return Beside(place, self.placement, Kronecker(place, width, self.rank, self.activation, self.dropout))
