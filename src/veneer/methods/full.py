"""Full fine-tuning of chosen parameters: the baseline, and what `also_train` and trained biases are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from veneer.delta import Delta, Method, Place, Unit, Weight, compute_dtype
from veneer.errors import MethodError


class Copy(Weight):
    """A trained copy that is read in place of the base's parameter."""

    mergeable = True
    linear = True

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(weight.detach().to(compute_dtype(weight.dtype), copy=True))

    def forward(self, w: Tensor) -> Tensor:
        return self.value.to(w.dtype)

    def merge(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.dtype)


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Train parameters whole, in copies of their own, so that the base stays and detaching is exact.

    Formula:
        W' = V, where V starts as W and is trained without restriction.

    Shapes:
        V has the shape of W, for every parameter (weights, biases, norms) below the named modules.

    Defaults:
        None to set. where: every parameter of the model.

    Cost:
        Trains 100% of what it names; keeps the base's parameters beside the trained float32 copies.

    Merging:
        Exact: the copy is stored in place of the base's parameter, rounded once to its dtype.

    Errors:
        MethodError where a parameter is quantized or integer, which cannot be trained.

    Paper:
        Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018, arXiv:1801.06146.
    Example:
        veneer.attach(model, veneer.FullFineTuning(), where="classifier")
    """

    unit: ClassVar[Unit] = "parameter"
    default_where: ClassVar[str] = "*"
    learning_rate: ClassVar[float] = 2e-5

    def build(self, place: Place) -> Delta:
        stored = place.weight
        if place.format.quantized or not stored.is_floating_point() or stored.numel() != math.prod(place.shape):
            kind = stored.dtype if type(stored) is nn.Parameter else type(stored).__name__
            raise MethodError(
                f"FullFineTuning cannot train {place.path}: it is stored as {kind}. Train a layer of floating "
                "point numbers, or attach LoRA there."
            )
        return Copy(stored)
