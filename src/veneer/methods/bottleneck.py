"""Bottleneck adapters: a thin two-layer network at a sublayer, on its output, beside it, or after its residual add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from veneer.bottleneck import Activation, Beside, Bottleneck, Placement, Scaling, width_of
from veneer.delta import Delta, Method, Place, Unit


@dataclass(frozen=True)
class BottleneckAdapter(Method):
    """A trained bottleneck A at each sublayer: down to a few dimensions, a nonlinearity, and up again.

    Formula:
        A(z) = s · (up · f(down · z + b) + c). With x the sublayer's input, y its output, r the residual stream, and N
        the norm that a post-norm block puts on r + y (elsewhere the identity):
        serial: y' = y + A(y) (Houlsby); parallel: y' = y + A(x) (He); after_residual: y' = y + A(N(r + y)) (Pfeiffer).

    Shapes:
        down [width, d], b [width], up [d, width], c [d] at a sublayer of width d; s one number, or [d].

    Defaults:
        width: of the bottleneck; None means d / reduction_factor.
        reduction_factor: d over width, where no width is given.
        placement: what A reads: "serial", "parallel" or "after_residual".
        activation: f: "relu", "gelu", "silu", "tanh" or "leaky_relu".
        dropout: probability of dropping an entry of A(z) while training.
        scaling: s: a number, "learned" (one trained number) or "channel" (a trained one for each dimension).
        bias: whether b and c are trained too.
        norm: whether z passes a trained LayerNorm first.

        down starts uniform within 1/sqrt(d), everything else at zero (s at one), so that training starts at the base.
        Published forms: `.houlsby()` with where="attention | mlp", `.pfeiffer()`, `.parallel()`, `.adapter_plus()`.

    Cost:
        2·width·d + width + d parameters a sublayer: 2,379,264 for Houlsby's 64 on BERT-base. It stays at inference.

    Merging:
        None: the nonlinearity has no weight form. Keep it attached.

    Errors:
        MethodError for a value out of range, width and reduction_factor together, or a sublayer whose input or stream
        cannot be read.

    Paper:
        Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, arXiv:1902.00751; Pfeiffer et al.,
        "MAD-X", EMNLP 2020, arXiv:2005.00052; He et al., "Towards a Unified View of Parameter-Efficient Transfer
        Learning", ICLR 2022, arXiv:2110.04366; Steitz and Roth, "Adapters Strike Back", CVPR 2024, arXiv:2406.06820.
    Example:
        veneer.attach(model, veneer.BottleneckAdapter.houlsby(width=64), where="attention | mlp")
    """

    width: Annotated[int, Field(ge=1)] | None = None
    reduction_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    placement: Placement = "serial"
    activation: Activation = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    scaling: Scaling = 1.0
    bias: bool = True
    norm: bool = False
    unit: ClassVar[Unit] = "sublayer"
    default_where: ClassVar[str] = "mlp"

    @classmethod
    def houlsby(cls, width: int = 64) -> BottleneckAdapter:
        """Houlsby et al. 2019; give where="attention | mlp". The paper trains the norms as well."""
        return cls(width=width, activation="gelu")

    @classmethod
    def pfeiffer(cls, reduction_factor: float = 16.0) -> BottleneckAdapter:
        """Pfeiffer et al. 2020, at the MLP only."""
        return cls(reduction_factor=reduction_factor, placement="after_residual")

    @classmethod
    def parallel(cls, width: int = 512) -> BottleneckAdapter:
        """He et al. 2022, at the MLP only."""
        return cls(width=width, placement="parallel", scaling=4.0)

    @classmethod
    def adapter_plus(cls, width: int = 8) -> BottleneckAdapter:
        """Steitz and Roth 2024, at the MLP only."""
        return cls(width=width, placement="after_residual", activation="gelu", scaling="channel")

    def build(self, place: Place) -> Delta:
        width = width_of(place, self.width, self.reduction_factor, type(self).reduction_factor)
        options = (self.activation, self.dropout, self.scaling, self.bias, self.norm)
        return Beside(place, self.placement, Bottleneck(place, width, *options))
