"""Answers that a model writes to held-out rows, against their references."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Any

from veneer.train import metrics
from veneer.train.recipe import Evaluation
from veneer.train.tasks.task import Collate, Task

SHOWN = 5


@dataclass
class Written:
    """Scores of written answers, and the first few of them."""

    metrics: dict[str, float] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)


def score(
    model: Any, processing: Any, rows: Any, collate: Collate, task: Task, evaluation: Evaluation, seed: int
) -> Written:
    """What the recipe asks for of written answers; nothing where it asks for none."""
    names = [name for name in evaluation.metrics or () if name in metrics.WRITTEN]
    if not names:
        return Written()
    assert task.ask is not None
    asked = task.ask(model, processing, _chosen(rows, evaluation.limit, seed), collate, evaluation.max_new_tokens)
    shown = [dict(zip(("prompt", "answer", "reference"), each, strict=True)) for each in zip(*asked, strict=True)]
    return Written(metrics.of_answers(asked.answers, asked.references, names), shown[:SHOWN])


def _chosen(rows: Any, limit: int, seed: int) -> list[dict[str, Any]]:
    """At most so many rows: by the seed, or the first of a stream."""
    if not isinstance(rows, Sized):
        return list(itertools.islice(rows, limit))
    numbers = range(len(rows))
    chosen = sorted(random.Random(seed).sample(numbers, limit)) if len(rows) > limit else numbers
    table: Any = rows
    return [table[number] for number in chosen]
