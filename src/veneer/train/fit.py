"""Training an adapter with transformers' own Trainer.

Nothing here loops over batches: the Trainer does, and with it come gradient accumulation, schedules and devices. What
is ours is the recipe, the examples, the optimizer, whose groups the adapter knows best (some methods want another
learning rate for one of their weights), and what a method adds to the loss or does after a step. The base stays in its
own precision and the adapter in float32; there is no autocast, because the adapter casts where it must.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

import veneer
from veneer import Adapter
from veneer.train.arguments import arguments
from veneer.train.batch import Collator
from veneer.train.callback import AdapterCallback
from veneer.train.labels import Encoded
from veneer.train.progress import History, Watch


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long to train, and how fast; `optimizer` is a name that `veneer.optimizer` knows."""

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 5
    seed: int = 0
    optimizer: str = "adamw"


def fit(
    model: PreTrainedModel,
    adapter: Adapter,
    rows: Sequence[Encoded],
    collator: Collator,
    recipe: Recipe,
    *,
    console: Console | None = None,
    probe: Callable[[], float] | None = None,
    probe_at: Collection[int] = (),
) -> History:
    """Trains the adapter's parameters on encoded examples, and leaves the model ready for inference.

    `probe` is a held-out loss to measure after the steps in `probe_at`.
    """
    watch = Watch(console or Console(stderr=True), probe, probe_at)
    optimizer = veneer.optimizer(adapter, recipe.optimizer, lr=recipe.learning_rate, weight_decay=0.0)
    with tempfile.TemporaryDirectory() as scratch, watch.bar:
        trainer = Trainer(
            model=model,
            args=_arguments(recipe, scratch),
            data_collator=collator,
            train_dataset=list(rows),
            optimizers=(optimizer, None),
            callbacks=[AdapterCallback(adapter), watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return watch.history


def _arguments(recipe: Recipe, scratch: str) -> TrainingArguments:
    return arguments(
        output_dir=scratch,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        train_sampling_strategy="group_by_length",
        seed=recipe.seed,
        save_strategy="no",
    )
