"""Veneer's dropout, which draws fewer random numbers than torch's, in the place of PEFT's."""

from __future__ import annotations

from torch import Tensor, nn

from veneer.ops.dropout import drawn


class Drawn(nn.Dropout):
    """The elements that Veneer would drop at this call."""

    def forward(self, x: Tensor) -> Tensor:
        draw = drawn(self, x)
        return draw(x) * draw.scale


def same_dropout(model: nn.Module) -> None:
    """Let a PEFT model drop what Veneer would."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout and child.p:
                setattr(module, name, Drawn(child.p))
