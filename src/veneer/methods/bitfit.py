"""BitFit: the bias vectors alone are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from veneer.delta import Delta, Method, Place, Unit
from veneer.errors import MethodError
from veneer.methods.full import Copy


@dataclass(frozen=True)
class BitFit(Method):
    """Bias-term fine-tuning: every bias vector is trained, in a copy, and nothing else.

    Formula:
        y = W · x + b', where b' starts as b.

    Shapes:
        b' has the shape of b, for every bias at or below the named modules: of linear layers, norms and heads alike.

    Defaults:
        None to set. where: every bias of the model.

    Cost:
        The biases: 102,912 of the 109,482,240 parameters of BERT-base, which is 0.09%. No cost at inference.

    Merging:
        Exact: the copy is stored in place of the base's bias, rounded once to its dtype.

    Errors:
        MethodError where the named modules have no bias, as in Llama.

    Paper:
        Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
        Language-models", ACL 2022, arXiv:2106.10199.
    Example:
        veneer.attach(model, veneer.BitFit(), also_train=["classifier"])
    """

    unit: ClassVar[Unit] = "parameter"
    default_where: ClassVar[str] = "*"
    learning_rate: ClassVar[float] = 2e-3

    def select(self, places: Sequence[Place]) -> Sequence[Place]:
        biases = [place for place in places if place.parameter.endswith("bias") and place.weight.dim() == 1]
        if not biases:
            raise MethodError(
                f"BitFit trains biases, and none of the {len(places)} parameters that `where` names is one. Name "
                "modules that have biases, or attach LoRA."
            )
        return biases

    def build(self, place: Place) -> Delta:
        return Copy(place.weight)
