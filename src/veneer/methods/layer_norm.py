"""LayerNorm tuning: the norms are trained whole, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from veneer.delta import Delta, Method, Place, Unit
from veneer.errors import MethodError
from veneer.methods.full import Copy


def _is_norm(module: nn.Module) -> bool:
    """A norm holds one vector of scales, and at most one of shifts beside it."""
    shapes = [parameter.shape for parameter in module._parameters.values() if parameter is not None]
    alike = module._parameters.get("weight") is not None and len({*shapes}) == 1 and len(shapes[0]) == 1
    return alike and not isinstance(module, nn.PReLU)


@dataclass(frozen=True)
class LayerNormTuning(Method):
    """LayerNorm tuning: the scales and shifts of every norm are trained, in copies, and nothing else.

    Formula:
        y = norm(x) · g' + b', where g' and b' start as g and b; a root-mean-square norm has no b.

    Shapes:
        g' and b' [width], for every norm at or below the named modules. Norms are told by their parameters: a vector
        named weight, and at most a bias of the same shape beside it.

    Defaults:
        None to set. where: every norm of the model.

    Cost:
        2 · width parameters a norm (width without a bias). No cost at inference.

    Merging:
        Exact: the copies are stored in place of the base's parameters, rounded once to their dtype.

    Errors:
        MethodError where the named modules hold no norm that has parameters.

    Paper:
        Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", ICLR 2024,
        arXiv:2312.11420.
    Example:
        veneer.attach(model, veneer.LayerNormTuning())
    """

    unit: ClassVar[Unit] = "parameter"
    default_where: ClassVar[str] = "*"
    learning_rate: ClassVar[float] = 2e-3

    def select(self, places: Sequence[Place]) -> Sequence[Place]:
        norms = [place for place in places if _is_norm(place.owner)]
        if not norms:
            raise MethodError(
                f"LayerNormTuning trains norms, and none of the {len(places)} parameters that `where` names is one's. "
                "Name norms by a glob, such as where='*norm*'."
            )
        return norms

    def build(self, place: Place) -> Delta:
        return Copy(place.weight)
