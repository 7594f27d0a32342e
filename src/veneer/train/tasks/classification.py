"""Texts with a class (one or two texts a row), or with a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from veneer.train import metrics
from veneer.train.tasks.task import Scored, Task


def scored(model: Any, batch: dict[str, Any]) -> Scored:
    """The loss of a batch, and what its logits say."""
    output = model(**batch)
    logits = output.logits.float().cpu()
    answers = logits.argmax(-1) if batch["labels"].dtype.is_floating_point is False else logits.squeeze(-1)
    return Scored(float(output.loss), len(batch["labels"]), (answers, batch["labels"].cpu()))


def classes(loss: float, outcomes: tuple[Tensor, ...], names: Sequence[str]) -> dict[str, float]:
    """Figures of predicted classes."""
    answers, truths = outcomes
    return metrics.of_classes(answers.tolist(), truths.tolist(), names)


def numbers(loss: float, outcomes: tuple[Tensor, ...], names: Sequence[str]) -> dict[str, float]:
    """Figures of predicted numbers."""
    answers, truths = outcomes
    return metrics.of_numbers(answers.tolist(), truths.tolist(), names)


def named(labels: list[str] | None) -> dict[str, Any]:
    """The classes of a model."""
    assert labels is not None
    numbered = dict(enumerate(labels))
    return {"num_labels": len(labels), "id2label": numbered, "label2id": {name: n for n, name in numbered.items()}}


CLASSIFICATION = Task(
    "sequence_classification",
    AutoModelForSequenceClassification,
    AutoTokenizer,
    metrics=metrics.CLASSES,
    usual=("accuracy", "f1"),
    scored=scored,
    figures=classes,
    options=named,
)
REGRESSION = Task(
    "regression",
    AutoModelForSequenceClassification,
    AutoTokenizer,
    metrics=metrics.NUMBERS,
    usual=("mean_absolute_error",),
    scored=scored,
    figures=numbers,
    options=lambda labels: {"num_labels": 1, "problem_type": "regression"},
)
