"""The low-rank pair that LoRA and its kin share: A projects a layer's input down to `rank`, B projects it up.

Where the layer is called, the pair runs beside it on activations and W' is never formed. Where its weight is read
functionally, the change s·B·A is added to the weight as it is read.

Adapter weights are kept in float32 and cast to the dtype of the activations for the product: that reads the activations
as they are and keeps no float32 copy of them for backward; matrix products accumulate in float32 all the same. What a
backward needs, and no more, is the business of `ops/lora.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.delta import After, Delta, Place, Weight, compute_dtype
from veneer.layers import Matrix
from veneer.ops import lora
from veneer.ops.dropout import Dropout, drawn


class Pair(Delta):
    """A [rank, in, *kernel], random, and B [out, rank, *1], zero, with their scale s; for each matrix of a stack."""

    mergeable = True
    additive = True
    fast = frozenset({"B"})

    def __init__(self, place: Place, rank: int, scale: float, init: str) -> None:
        super().__init__()
        assert place.map is not None
        self.map = place.map
        self.rank = rank
        self.scale = scale
        dtype, device = compute_dtype(place.weight.dtype), place.weight.device
        a, b = self.map.factors(place.shape, rank)
        self.A = nn.Parameter(torch.empty(a, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(b, dtype=dtype, device=device))
        for matrix in self.map.matrices(self.A.data):
            _start(matrix, init, self.map.fan_in(place.shape))

    def parts(self) -> Sequence[tuple[Tensor, Tensor, float]]:
        """(A, B, sign) of each product whose signed sum, times the scale, is the change."""
        return ((self.A, self.B, 1.0),)

    def together(self) -> tuple[Tensor, Tensor, float]:
        """A and B of all parts as one pair of matrices, or of stacks of them, with its scale."""
        (A, B, sign), *rest = self.parts()
        if rest:
            A = torch.cat([A, *(other for other, _, _ in rest)], dim=-2)
            B = torch.cat([B, *(other * (sign * turn) for _, other, turn in rest)], dim=-1)
        return A, B, sign * self.scale

    def merge(self, weight: Tensor) -> Tensor:
        return weight + total(
            [
                sign * self.scale * self.map.product(A.to(weight.dtype), B.to(weight.dtype))
                for A, B, sign in self.parts()
            ]
        )


class Beside(Pair, After):
    """y + B(s·A(dropout(x)))."""

    plain: ClassVar[bool] = True
    """Whether nothing but A, B and the scale makes the change."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.plain = cls.change is Beside.change and cls.parts is Pair.parts

    def __init__(self, place: Place, rank: int, scale: float, init: str, dropout: float) -> None:
        super().__init__(place, rank, scale, init)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.plain and not self.training and isinstance(self.map, Matrix):
            A, B = self._parameters.get("A"), self._parameters.get("B")  # by `self.A` it takes as long as the products
            if A is not None and B is not None:
                return lora.beside(x, y, A, B, self.scale)
        return self.change(x, y, drawn(self.dropout, x))

    def pair(self) -> tuple[Tensor, Tensor, float] | None:
        """A and B of all parts together, unless dropout or a subclass has its own way with x and y."""
        plain = isinstance(self.map, Matrix) and type(self).change is Beside.change
        return None if not plain or (self.training and self.dropout.p) else self.together()

    def change(self, x: Tensor, y: Tensor, dropout: Dropout) -> Tensor:
        """The base's answer y with the pair in it."""
        parts = self.parts()
        if len(parts) == 1 and isinstance(self.map, Matrix):
            ((A, B, sign),) = parts
            return lora.beside(x, y, A, B, sign * self.scale, dropout)
        scale = self.scale * dropout.scale
        return y + total(
            [self.map.up(self.down(x, A, y, dropout) * (sign * scale), B.to(y.dtype)) for A, B, sign in parts]
        )

    def down(self, x: Tensor, A: Tensor, y: Tensor, dropout: Dropout) -> Tensor:
        """What A makes of what dropout leaves of x, in the dtype of y, before dropout's scale."""
        if isinstance(self.map, Matrix):
            return lora.down(x, A, y.dtype, dropout)
        return self.map.down(dropout(x.to(y.dtype) if x.is_floating_point() else x), A.to(y.dtype))

    def added(self, h: Tensor, y: Tensor, B: Tensor, scale: float) -> Tensor:
        """y with scale·B(h) added to it."""
        if isinstance(self.map, Matrix):
            return lora.up(h, y, B, scale)
        return y + self.map.up(h * scale, B.to(y.dtype))

    def turned(self, h: Tensor, y: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
        """bias + g·(y - bias + s·B(h)), with one g for each output."""
        if isinstance(self.map, Matrix):
            return lora.turned(h, y, self.B, g, bias, self.scale)
        plain = y if bias is None else y - self.map.along(bias.to(y.dtype))
        B = g.view(-1, *[1] * (self.B.dim() - 1)) * self.B
        return self.added(h, y + self.map.along((g - 1).to(y.dtype)) * plain, B, self.scale)


class Inside(Pair, Weight):
    """w + s·B·A."""

    def forward(self, w: Tensor) -> Tensor:
        return self.merge(w)

    def pair(self) -> tuple[Tensor, Tensor, float] | None:
        return self.together() if type(self).merge is Pair.merge else None


def total(terms: Sequence[Tensor]) -> Tensor:
    """Their sum, made before anything is added to it: equal terms of opposite sign leave exactly nothing."""
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def _start(A: Tensor, init: str, fan_in: int) -> None:
    """Fill A so that A·x starts with entries of the same spread at every width (orthogonal: exactly)."""
    if init == "kaiming":
        bound = 1 / math.sqrt(fan_in)
        nn.init.uniform_(A, -bound, bound)
    elif init == "gaussian":
        nn.init.normal_(A, std=1 / len(A))
    else:
        nn.init.orthogonal_(A)


class Projections(nn.Module):
    """A [rank, widest in] and B [widest out, rank], uniform within sqrt(6 / fan in) and never trained."""

    A: Tensor
    B: Tensor

    def __init__(self, places: Sequence[Place], rank: int, seed: int, saved: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = {"A": (rank, max(p.shape[1] for p in places)), "B": (max(p.shape[0] for p in places), rank)}
        for name, size in sizes.items():
            drawn = torch.empty(size, device="meta" if places[0].weight.is_meta else "cpu")
            bound = math.sqrt(6 / size[1])
            if not drawn.is_meta:
                drawn.uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to(**places[0].new), persistent=saved)


class Vectors(Delta):
    """d [rank] and b [out], which scale what the shared A and B give."""

    mergeable = True
    additive = True
    shared: Projections

    def __init__(self, place: Place, rank: int, d_initial: float, dropout: float) -> None:
        super().__init__()
        self.borrow(shared=place.shared)
        self.shape = place.shape
        self.dropout = nn.Dropout(dropout)
        self.d = nn.Parameter(torch.full((rank,), d_initial, **place.new))
        self.b = nn.Parameter(torch.zeros(place.shape[0], **place.new))

    def factors(self) -> tuple[Tensor, Tensor]:
        """This layer's parts of A and B, where its own vectors are."""
        A, B = self.shared.A[:, : self.shape[1]], self.shared.B[: self.shape[0]]
        return A.to(self.d.device), B.to(self.d.device)

    def merge(self, weight: Tensor) -> Tensor:
        A, B = (factor.to(weight.dtype) for factor in self.factors())
        return weight + self.b.to(weight.dtype)[:, None] * B * self.d.to(weight.dtype) @ A


class BesideShared(Vectors, After):
    """y + diag(b)·B·diag(d)·A·dropout(x)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        A, B = self.factors()
        dropout = drawn(self.dropout, x)
        return lora.scaled(lora.down(x, A, y.dtype, dropout), y, self.d, B, self.b, dropout.scale)


class InsideShared(Vectors, Weight):
    """w + diag(b)·B·diag(d)·A."""

    def forward(self, w: Tensor) -> Tensor:
        return self.merge(w)
