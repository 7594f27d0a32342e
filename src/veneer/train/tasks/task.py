"""What a run has to know of a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from veneer.train.labels import IGNORED
from veneer.train.metrics import WRITTEN

Collate = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]


class Answered(NamedTuple):
    """What a model was asked, what it wrote, and what it should have written."""

    prompts: list[str]
    answers: list[str]
    references: list[str]


class Scored(NamedTuple):
    """One batch: the mean loss of what it is learned from, over how many things, and what figures are made of."""

    loss: float
    learned: int
    outcomes: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task, as its own module makes it.

    loader: the Auto class of transformers that loads its model. processing: the one of what makes its batches.
    metrics: those that mean something for it. usual: measured where a recipe names none.
    options: labels -> what else loads the model.
    scored: model, batch on its device -> Scored.
    figures: loss, outcomes of all batches joined, names -> figures; those of written answers left out.
    ask: model, processing, rows, collate, max_new_tokens -> Answered; None for what writes nothing.
    loss: model, batch -> the loss to train; None where the model has its own.
    """

    name: str
    loader: Any
    processing: Any
    metrics: tuple[str, ...]
    usual: tuple[str, ...]
    scored: Callable[[Any, dict[str, Any]], Scored]
    figures: Callable[[float, tuple[Tensor, ...], Sequence[str]], dict[str, float]]
    options: Callable[[list[str] | None], dict[str, Any]] = lambda labels: {}
    ask: Callable[[Any, Any, Sequence[dict[str, Any]], Collate, int], Answered] | None = None
    loss: Callable[..., Tensor] | None = None

    def plain(self, named: Sequence[str] | None) -> tuple[str, ...]:
        """The metrics that need no written answers."""
        return tuple(name for name in (self.usual if named is None else named) if name not in WRITTEN)


def counted(model: Any, batch: dict[str, Any]) -> Scored:
    """The model's own loss, over its labels that are not ignored."""
    return Scored(float(model(**batch).loss), int((batch["labels"] != IGNORED).sum()))


def perplexity(loss: float, outcomes: tuple[Tensor, ...], names: Sequence[str]) -> dict[str, float]:
    """exp of the loss, where it is asked for."""
    return {"perplexity": math.exp(min(loss, 700.0))} if "perplexity" in names else {}


def decoded(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The texts of the rows' labels."""
    answers = [[label for label in row["labels"] if label != IGNORED] for row in rows]
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.strip() for text in texts]
