"""Bottleneck adapters: a small two-layer network beside or behind a sublayer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from veneer.activations import Activation, activations
from veneer.delta import After, Delta, Method, Place, Unit
from veneer.errors import MethodError

_READS = {"serial": "", "parallel": "input", "after_residual": "residual"}
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Bottleneck(After):
    """y + s·A(·), where A reads y, the sublayer's input, or the residual stream with y added."""

    def __init__(self, place: Place, width: int, method: BottleneckAdapter) -> None:
        super().__init__()
        (hidden,) = place.shape
        self.reads = _READS[method.placement]
        self.activation = method.activation
        self.dropout = nn.Dropout(method.dropout)
        self.down = nn.Linear(hidden, width, **place.new)
        self.up = nn.Linear(width, hidden, **place.new)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        learned = method.scaling == "learned"
        self.scale: Any = nn.Parameter(torch.ones(hidden, **place.new)) if learned else method.scaling

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x + y if self.reads == "residual" else x if self.reads else y
        down, up = self.down, self.up
        h = F.linear(self.dropout(h), down.weight.to(y.dtype), down.bias.to(y.dtype))
        h = F.linear(activations[self.activation](h), up.weight.to(y.dtype), up.bias.to(y.dtype))
        return y + h * (self.scale.to(y.dtype) if isinstance(self.scale, Tensor) else self.scale)


@dataclass(frozen=True)
class BottleneckAdapter(Method):
    """A bottleneck: down to `width`, a nonlinearity, up again, added to what a sublayer gives.

    Formula:
        A(h) = W_up·act(W_down·h + b_down) + b_up; the sublayer's output y, before it joins the stream x, becomes
        serial:          y + s·A(y)          Houlsby et al., where="attention | mlp"
        parallel:        y + s·A(input)      He et al.; the sublayer's own input, behind the norm of a pre-norm block
        after_residual:  y + s·A(x + y)      Pfeiffer et al., where="mlp"

    Shapes:
        W_down [width, hidden], W_up [hidden, width], and their biases; s is a number or, learned, [hidden].

    Defaults:
        width: of the bottleneck; None means hidden / reduction_factor, rounded, at least 1.
        reduction_factor: hidden size over width, where width is None.
        placement: "serial", "parallel" or "after_residual".
        activation: "relu", "gelu", "silu", "tanh" or "identity".
        dropout: probability of dropping an input of W_down while training.
        scaling: s, a number, or "learned": one number a channel that starts at 1 (AdapterPlus).

    Cost:
        2·hidden·width + hidden + width parameters a sublayer: 2,379,264 for width 64 after both sublayers of BERT-base.
        Runs at inference: it cannot be merged.

    Merging:
        None: the nonlinearity has no weight form.

    Errors:
        MethodError where width and reduction_factor are both given, or the place has no input or stream to read.

    Paper:
        Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, arXiv:1902.00751; Pfeiffer et al.,
        "AdapterFusion", EACL 2021, arXiv:2005.00247; He et al., "Towards a Unified View of Parameter-Efficient Transfer
        Learning", ICLR 2022, arXiv:2110.04366; Steitz and Roth, "Adapters Strike Back", CVPR 2024, arXiv:2406.06820.

    Example:
        veneer.attach(model, veneer.BottleneckAdapter(width=64, activation="silu"), where="attention | mlp")
    """

    width: Annotated[int, Field(ge=1)] | None = None
    reduction_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    placement: Literal["serial", "parallel", "after_residual"] = "serial"
    activation: Activation = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    scaling: Finite | Literal["learned"] = 1.0
    unit: ClassVar[Unit] = "sublayer"
    default_where: ClassVar[str] = "mlp"

    def build(self, place: Place) -> Delta:
        if self.width is not None and self.reduction_factor is not None:
            raise MethodError("width and reduction_factor say the same thing twice. Give one of them.")
        if _READS[self.placement] and _READS[self.placement] not in place.sources:
            raise MethodError(f"no module passes what placement='{self.placement}' reads. Use placement='serial'.")
        width = self.width or max(1, round(place.shape[0] / (self.reduction_factor or 16)))
        return Bottleneck(place, width, self)
