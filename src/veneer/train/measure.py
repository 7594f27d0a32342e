"""What a model does on held-out rows: its loss and perplexity, accuracy and F1 of classes, errors of numbers.

No data loader and no random number takes part, so a run that is measured more often trains just the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from veneer.train.batch import by_length
from veneer.train.encoding import IGNORED
from veneer.train.evaluate import evaluating, on_device

CLASSES = ("sequence_classification", "image_classification")


def measure(
    model: Any, rows: Any, collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]], task: str, batch_size: int
) -> dict[str, float]:
    """The figures of a task, over all rows: a loss is a mean over what is learned (tokens, or rows)."""
    total, count = 0.0, 0
    answers: list[Tensor] = []
    truths: list[Tensor] = []
    with evaluating(model):
        for group in _groups(rows, batch_size):
            batch = on_device(model, collate(group))
            output = model(**batch)
            learned = _learned(batch["labels"], task)
            total += float(output.loss) * learned
            count += learned
            if task in CLASSES or task == "regression":
                answers.append(output.logits.float().cpu())
                truths.append(batch["labels"].cpu())
    loss = total / count
    found = {"loss": loss}
    if task in CLASSES:
        return found | classes(torch.cat(answers).argmax(-1), torch.cat(truths))
    if task == "regression":
        difference = torch.cat(answers).squeeze(-1) - torch.cat(truths)
        return found | {"mean_absolute_error": float(difference.abs().mean())}
    return found | {"perplexity": math.exp(min(loss, 700.0))}


def _groups(rows: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    """The rows in batches, of like length where all are there to be sorted."""
    if isinstance(rows, Sized):
        table: Any = rows
        lengths = table["length"] if "length" in table.column_names else [0] * len(rows)
        for numbers in by_length(lengths, size):
            yield [table[number] for number in numbers]
        return
    stream = iter(rows)
    while group := list(itertools.islice(stream, size)):
        yield group


def _learned(labels: Tensor, task: str) -> int:
    """How many things a batch's loss is a mean over."""
    if labels.dim() < 2:
        return len(labels)
    return int((labels[:, 1:] != IGNORED).sum() if task == "causal" else (labels != IGNORED).sum())


def classes(answers: Tensor, truths: Tensor) -> dict[str, float]:
    """Accuracy, and F1 as the plain mean over the classes that occur."""
    scores = []
    for label in truths.unique().tolist():
        right = int(((answers == label) & (truths == label)).sum())
        wrong = int(((answers == label) != (truths == label)).sum())
        scores.append(2 * right / (2 * right + wrong))
    return {"accuracy": float((answers == truths).float().mean()), "f1": sum(scores) / len(scores)}
