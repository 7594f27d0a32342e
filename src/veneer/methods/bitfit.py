"""BitFit: train the biases and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from veneer.methods.full import FullFineTuning


@dataclass(frozen=True)
class BitFit(FullFineTuning):
    """Bias-term fine-tuning: every bias is trained, every matrix stays.

    Formula:
        b' = b + db, for each bias; W' = W.

    Shapes:
        Those of the biases.

    Defaults:
        None to set. where: every parameter called a bias.

    Cost:
        About 0.1% of BERT's parameters, kept as a trained copy. Nothing once merged.

    Merging:
        Exact: the trained bias is stored in place of the base's, rounded once to its dtype.

    Errors:
        NoSuchPlace where the model has no biases, as most recent language models.

    Paper:
        Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        ACL 2022, arXiv:2106.10199.

    Example:
        veneer.attach(model, veneer.BitFit(), also_train=["classifier"])
    """

    default_where: ClassVar[str] = r"re:(.*\.)?\w*bias"
