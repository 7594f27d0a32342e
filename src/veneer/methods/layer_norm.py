"""LayerNorm tuning: train the norms and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from veneer.methods.full import FullFineTuning


@dataclass(frozen=True)
class LayerNormTuning(FullFineTuning):
    """Train the gains and biases of the normalisation layers.

    Formula:
        y = g' · normalise(x) + b', with g' and b' trained; every matrix stays.

    Shapes:
        Those of the norms: [hidden].

    Defaults:
        None to set. where: the role `norm`, every module whose weight is a vector.

    Cost:
        Two vectors (RMSNorm: one) of the hidden size a norm, about 0.03% of a model. Nothing once merged.

    Merging:
        Exact: the trained vectors are stored in place of the base's, rounded once to their dtype.

    Errors:
        NoSuchPlace where the model has no norm with a weight.

    Paper:
        Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", ICLR 2024,
        arXiv:2312.11420.

    Example:
        veneer.attach(model, veneer.LayerNormTuning())
    """

    default_where: ClassVar[str] = "norm"
