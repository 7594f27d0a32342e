"""What a recipe can train: one module a task, which says how its model is loaded, measured and asked."""

from veneer.train.tasks.causal import CAUSAL
from veneer.train.tasks.classification import CLASSIFICATION, REGRESSION
from veneer.train.tasks.image import IMAGE
from veneer.train.tasks.preference import PREFERENCE, with_beta
from veneer.train.tasks.seq2seq import SEQ2SEQ
from veneer.train.tasks.speech import SPEECH
from veneer.train.tasks.task import Answered, Task

TASKS = {task.name: task for task in (CAUSAL, CLASSIFICATION, REGRESSION, IMAGE, PREFERENCE, SEQ2SEQ, SPEECH)}
"""By the name that `Prepared.task` has."""


def of(name: str, dpo_beta: float | None) -> Task:
    """A task as a recipe wants it."""
    return with_beta(dpo_beta) if name == PREFERENCE.name else TASKS[name]


__all__ = ["TASKS", "Answered", "Task", "of"]
