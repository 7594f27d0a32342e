"""DoRA: LoRA that trains the direction of each weight row and its length apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.delta import After, Delta, Place, Weight
from veneer.errors import MethodError
from veneer.lowrank import Pair
from veneer.methods.lora import LoRA


class _Directed(Pair):
    """A and B as in LoRA, and m [out], the length of each row of W'."""

    def __init__(self, place: Place, *pair: Any) -> None:
        super().__init__(place, *pair)
        if len(place.shape) != 2:
            raise MethodError("DoRA needs a weight of two dimensions, and this one has more. Attach LoRA there.")
        self.base = place.product()
        self.squared: Tensor
        self.register_buffer("squared", place.read().to(self.A.dtype).square().sum(1).detach(), persistent=False)
        self.m = nn.Parameter(self.squared.sqrt())

    def merge(self, weight: Tensor) -> Tensor:
        changed = super().merge(weight)
        turned: Tensor = changed * (self.m.to(weight.dtype) / changed.detach().norm(dim=1)).unsqueeze(1)
        return turned

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Row lengths of W + s·B·A from ||W||² + 2s·<W, B·A> + s²·||B·A||², with W only ever multiplied by."""
        stored = self.base.dtype(self.A.dtype)
        crossed = (self.base(self.A.to(stored)).T.to(self.B.dtype) * self.B).sum(1)
        own = ((self.B @ (self.A @ self.A.T)) * self.B).sum(1)
        return (self.squared + 2 * self.scale * crossed + self.scale**2 * own).clamp(min=0).sqrt()


class _BesideDirected(_Directed, After):
    """y + (t - 1)·(y - b) + t·B(s·A(dropout(x))), t = m / ||W + s·B·A||."""

    def __init__(self, place: Place, rank: int, scale: float, init: str, dropout: float) -> None:
        super().__init__(place, rank, scale, init)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            x = self.dropout(x.to(y.dtype))
        bias = self.base.bias()
        turn = (self.m / self.lengths()).to(y.dtype)
        change = self.map.up(self.map.down(x, self.A.to(y.dtype)) * self.scale, self.B.to(y.dtype))
        return y + (turn - 1) * (y if bias is None else y - bias) + turn * change


class _InsideDirected(_Directed, Weight):
    """m · (w + s·B·A) / ||w + s·B·A||."""

    def forward(self, w: Tensor) -> Tensor:
        return self.merge(w)


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: a low-rank change of every row's direction, and a trained length.

    Formula:
        W' = m · (W + s·B·A) / ||W + s·B·A||, row by row, s = alpha / rank; no gradient flows through the length.

    Shapes:
        A [rank, in], B [out, rank], m [out], which starts as the row lengths of W.

    Defaults:
        As LoRA's, of which this is a kind: rank, alpha, dropout (on the low-rank path), use_rslora, init, bias and
        the patterns.

    Cost:
        rank · (in + out) + out parameters a layer, and one product of A with W a forward. Nothing once merged.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        MethodError on a convolution, and wherever LoRA raises one.

    Paper:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv:2402.09353.

    Example:
        veneer.attach(model, veneer.DoRA(rank=8, alpha=16.0))
    """

    deltas: ClassVar[tuple[type[Delta], type[Delta]]] = (_BesideDirected, _InsideDirected)
