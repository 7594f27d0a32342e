"""DoRA: LoRA for the direction of every weight row, and a trained length for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.delta import Place, Product
from veneer.lowrank import Beside, Inside, Pair
from veneer.methods.lora import LoRA
from veneer.ops.dropout import Dropout


class _Rows(Pair):
    """m, the length of each row of W', which starts as that of W's; `squares` are the squared lengths of W's rows."""

    additive, measures = False, True
    product: Product

    def __init__(self, place: Place, *options: Any) -> None:
        super().__init__(place, *options)
        self.borrow(product=place.product())
        start = self.B.new_zeros(place.shape[0])
        squares = start if start.is_meta else place.read().flatten(1).to(start).pow(2).sum(1)
        self.register_buffer("squares", squares, persistent=False)
        self.m = nn.Parameter(squares.sqrt())

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Those of the rows of W + s·B·A: |W|² + 2s·<W, B·A> + s²·|B·A|², none of which forms the product B·A."""
        A, B, W = self.A.flatten(1), self.B.flatten(1), self.product.place.weight
        crossed = self.product(A.to(W.dtype) if W.is_floating_point() and W.itemsize > 1 else A).T.to(B.dtype)
        changes = (2 * self.scale * crossed + self.scale**2 * (B @ (A @ A.T))) * B
        squares: Tensor = self.get_buffer("squares") + changes.sum(1)
        return torch.sqrt(squares.clamp_min(torch.finfo(squares.dtype).tiny))

    def merge(self, weight: Tensor) -> Tensor:
        changed = super().merge(weight)
        lengths = changed.detach().flatten(1).pow(2).sum(1).sqrt().clamp_min(torch.finfo(weight.dtype).tiny)
        return changed * (self.m.to(weight.dtype) / lengths).view(-1, *[1] * (weight.dim() - 1))


class _Beside(_Rows, Beside):
    """y + (g-1)·(y - bias) + g·s·B·A·x with g = m / |W + s·B·A|."""

    def change(self, x: Tensor, y: Tensor, dropout: Dropout) -> Tensor:
        g, h = self.m / self.lengths(), self.down(x, self.A, y, dropout)
        if dropout.seed is None:
            return self.turned(h, y, g, self.product.bias())
        x, place = dropout(x.to(y.dtype)), self.product.place  # PEFT's: the base's part sees dropped inputs
        plain = self.product(x) if len(place.shape) == 2 else self.map.down(x, place.read().to(y.dtype))
        y = y + self.map.along(((g - 1) * dropout.scale).to(y.dtype)) * plain
        return self.added(h, y, g.view(-1, *[1] * (self.B.dim() - 1)) * self.B, self.scale * dropout.scale)


class _Inside(_Rows, Inside):
    """m · (w + s·B·A) / |w + s·B·A|."""


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: LoRA turns each row of a weight, and a trained vector gives its length.

    Formula:
        W' = m · (W + s·B·A) / |W + s·B·A|, row by row, with LoRA's s; the length below is a constant in backward.

    Shapes:
        A [rank, in] and B [out, rank] as in LoRA; m [out], which starts as the lengths of W's rows.

    Defaults:
        rank: width of the product.
        alpha: numerator of the scale.
        dropout: probability of dropping an input while training, of A and of the part of W that m adds.
        use_rslora: scale by alpha / sqrt(rank).
        init: of A, as in LoRA; B is zero.
        bias: base biases trained as well: "none", "lora_only" (of the adapted layers) or "all".
        rank_pattern: other ranks, by glob or `re:` regex over module paths; the first match holds.
        alpha_pattern: other alphas, likewise.

    Cost:
        rank · (in + out) + out parameters a layer; W·Aᵀ at each step, as much as `rank` more tokens. None once merged.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        MethodError as for LoRA.

    Paper:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv:2402.09353.
    Example:
        veneer.attach(model, veneer.DoRA(rank=8, alpha=16.0), where="attention.q | attention.v")
    """

    beside: ClassVar[type[Beside]] = _Beside
    inside: ClassVar[type[Inside]] = _Inside
