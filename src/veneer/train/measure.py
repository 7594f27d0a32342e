"""What a model does on held-out rows: its loss, and the figures of its task.

No data loader and no random number takes part, so a run that is measured more often trains just the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch

from veneer.train.batch import by_length
from veneer.train.evaluate import evaluating, on_device
from veneer.train.tasks.task import Collate, Task


def measure(
    model: Any, rows: Any, collate: Collate, task: Task, batch_size: int, metrics: Sequence[str] | None = None
) -> dict[str, float]:
    """The loss over all rows, a mean over what is learned (tokens, or rows), and the metrics that nothing is written
    for; the task's usual ones where `metrics` is None."""
    found = []
    with evaluating(model):
        for group in _groups(rows, batch_size):
            found.append(task.scored(model, on_device(model, collate(group))))
    loss = sum(one.loss * one.learned for one in found) / sum(one.learned for one in found)
    outcomes = tuple(torch.cat(each) for each in zip(*(one.outcomes for one in found), strict=True))
    return {"loss": loss} | task.figures(loss, outcomes, task.plain(metrics))


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
