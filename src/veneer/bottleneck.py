"""The bottleneck that adapters beside a sublayer share, and where it stands.

A sublayer turns its input x into y, which the block adds to its residual stream r; a post-norm block puts its norm N on
the sum, elsewhere N is the identity. A bottleneck A reads z and adds to y:

    serial          y' = y + A(y)
    parallel        y' = y + A(x)
    after_residual  y' = y + A(N(r + y))

Weights are kept in float32 and cast to the dtype of the activations for the products. The scale, and dropout's, are
folded into the up projection, whose entries are few beside those of the activations; of dropout's mask a seed is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from veneer.delta import After, Place
from veneer.errors import MethodError
from veneer.ops.dropout import drawn

Placement = Literal["serial", "parallel", "after_residual"]
Activation = Literal["relu", "gelu", "silu", "tanh", "leaky_relu"]
Scaling = Annotated[float, Field(allow_inf_nan=False)] | Literal["learned", "channel"]

_READS: dict[Placement, str] = {"serial": "", "parallel": "input", "after_residual": "residual"}
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
}


def width_of(place: Place, width: int | None, reduction_factor: float, default: float) -> int:
    """The bottleneck's width: as given, or the sublayer's divided by the factor, and at least 1."""
    if width and reduction_factor != default:
        raise MethodError("width and reduction_factor say the same thing twice. Leave one of them out.")
    return width or max(1, int(place.shape[0] / reduction_factor))


class Bottleneck(nn.Module):
    """A(z) = dropout(s·(up·f(down·norm(z) + b) + c)); up and c start at zero, so A starts at zero."""

    def __init__(
        self,
        place: Place,
        width: int,
        activation: Activation = "relu",
        dropout: float = 0.0,
        scaling: Scaling = 1.0,
        bias: bool = True,
        norm: bool = False,
    ) -> None:
        super().__init__()
        (outer,) = place.shape
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.factors(place, width)
        self.down_bias = nn.Parameter(torch.zeros(width, **place.new)) if bias else None
        self.up_bias = nn.Parameter(torch.zeros(outer, **place.new)) if bias else None
        self.norm_weight = nn.Parameter(torch.ones(outer, **place.new)) if norm else None
        self.norm_bias = nn.Parameter(torch.zeros(outer, **place.new)) if norm else None
        self.scale: float | nn.Parameter
        if isinstance(scaling, str):
            self.scale = nn.Parameter(torch.ones(1 if scaling == "learned" else outer, **place.new))
        else:
            self.scale = scaling

    def factors(self, place: Place, width: int) -> None:
        """Make what `matrices` is made of: here down, uniform within 1/sqrt(fan in), and up, zero."""
        (outer,) = place.shape
        bound = 1 / math.sqrt(outer)
        self.down = nn.Parameter(torch.empty(width, outer, **place.new).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(outer, width, **place.new))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """down [width, outer] and up [outer, width]."""
        return self.down, self.up

    def forward(self, z: Tensor) -> Tensor:
        down, up = self.matrices()
        up_bias: Tensor | None = self.up_bias
        dropout = drawn(self.dropout, z)
        scale = self.scale * dropout.scale
        if not isinstance(scale, float) or scale != 1.0:
            up = up * (scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale)
            up_bias = None if up_bias is None else up_bias * scale
        if self.norm_weight is not None:
            z = F.layer_norm(z, z.shape[-1:], _cast(self.norm_weight, z), _cast(self.norm_bias, z))
        h = _ACTIVATIONS[self.activation](F.linear(z, down.to(z.dtype), _cast(self.down_bias, z)))
        return dropout(F.linear(h, up.to(z.dtype), _cast(up_bias, z)))


def _cast(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(like.dtype)


class Coupling(nn.Module):
    """The two halves of a vector change each other in turn, which can be undone exactly."""

    def __init__(self, place: Place, width: int, activation: Activation) -> None:
        super().__init__()
        self.F, self.G = Bottleneck(place, width, activation), Bottleneck(place, width, activation)

    def forward(self, e: Tensor, inverse: bool = False) -> Tensor:
        a, b = e.chunk(2, -1)
        if inverse:
            b = b - self.G(a)
            return torch.cat([a - self.F(b), b], -1)
        a = a + self.F(b)
        return torch.cat([a, b + self.G(a)], -1)


class Rules(nn.Module):
    """The small matrices A [terms, terms, terms] that all places share; a call gives them."""

    def __init__(self, place: Place, terms: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(terms, terms, terms, **place.new).normal_(std=0.01))

    def forward(self) -> Tensor:
        return self.A


class Kronecker(Bottleneck):
    """A bottleneck with W = Σ_i A_i ⊗ (s_i·t_i) for down and up; up's t starts at zero."""

    def __init__(self, place: Place, width: int, rank: int, activation: Activation, dropout: float) -> None:
        self.rank = rank
        super().__init__(place, width, activation, dropout)
        vars(self)["rules"] = place.shared  # kept, not owned

    def factors(self, place: Place, width: int) -> None:
        assert isinstance(place.shared, Rules)
        terms, (outer,) = len(place.shared.A), place.shape
        parts = {"down": (width // terms, outer // terms), "up": (outer // terms, width // terms)}
        for name, (rows, columns) in parts.items():
            self.register_parameter(f"{name}_s", _glorot(torch.empty(terms, rows, self.rank, **place.new)))
            self.register_parameter(f"{name}_t", _glorot(torch.empty(terms, self.rank, columns, **place.new)))
        nn.init.zeros_(self.up_t)

    down_s: nn.Parameter
    down_t: nn.Parameter
    up_s: nn.Parameter
    up_t: nn.Parameter
    rules: nn.Module

    def matrices(self) -> tuple[Tensor, Tensor]:
        rules = self.rules().to(self.up_t.device)
        return _sum(rules, self.down_s @ self.down_t), _sum(rules, self.up_s @ self.up_t)


def _glorot(empty: Tensor) -> nn.Parameter:
    bound = (6 / (empty.shape[1] + empty.shape[2])) ** 0.5
    return nn.Parameter(empty.uniform_(-bound, bound))


def _sum(left: Tensor, right: Tensor) -> Tensor:
    """Σ_i left_i ⊗ right_i."""
    return torch.einsum("nab,ncd->acbd", left, right).flatten(0, 1).flatten(1)


class Branch(After):
    """A bottleneck, or several, at one placement: y + A(z)."""

    def __init__(self, place: Place, placement: Placement) -> None:
        super().__init__()
        self.placement = placement
        self.reads = _READS[placement]
        self.borrow(norm=place.norm if placement == "after_residual" else None)

    norm: nn.Module | None

    def read(self, x: Tensor, y: Tensor) -> Tensor:
        """z, which the placement reads."""
        if self.placement == "serial":
            return y
        z = (x if self.placement == "parallel" else x + y).to(y.dtype)
        return z if self.norm is None else self.norm(z)


class Beside(Branch):
    """y + A(z) with one bottleneck A."""

    def __init__(self, place: Place, placement: Placement, bottleneck: Bottleneck) -> None:
        super().__init__(place, placement)
        self.bottleneck = bottleneck

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        change: Tensor = self.bottleneck(self.read(x, y))
        return y + change
