"""train: from a recipe to an adapter on disk, its figures, and all that repeats the run.

The folder of a run holds `adapter/` (with `recipe.yaml`), `report.json`, `curve.png`, `tensorboard/`, `checkpoints/`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from veneer.errors import RunError
from veneer.train import checkpoint, models, tasks
from veneer.train import recipe as recipes
from veneer.train.attempt import Result, Run
from veneer.train.data import Prepared, prepare, recognize
from veneer.train.machine import fitted_to_machine
from veneer.train.processes import processes
from veneer.train.recipe import Recipe
from veneer.train.refusing import refuse, refuse_metrics, refuse_used
from veneer.train.settling import resolve, settle
from veneer.train.watching import Signals


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    console: Console | None = None,
    prepared: Prepared | None = None,
) -> Result:
    """Run a recipe: a file's path, a mapping with the same keys, or a Recipe. `overrides` are texts `key=value`.

    Raises RecipeError with a line for each mistake, DataError for the rows, RunError where the folder is not free or
    memory does not suffice, Diverged where the loss is lost, Stopped after a signal; `resume=True` goes on from the
    last whole checkpoint, to the bit. `prepared` are the recipe's rows, where they were made before.
    """
    found = _read(recipe, overrides)
    several = processes()
    console = console or Console(stderr=True, highlight=False)
    if not several.is_main_process:
        console = Console(quiet=True)
    folder = Path(found.output)
    data = found.data
    _, task = recognize(data)
    if data.labels == "numbers":
        task = "regression"
    refuse(found, tasks.of(task, found.training.dpo_beta))
    signals = Signals()
    with (
        fitted_to_machine(),
        checkpoint.locked(folder, several.is_main_process),
        signals.caught_here(),
        checkpoint.scratch(folder / f".rows-{several.process_index}") as rows,
    ):
        refuse_used(folder, resume)
        processing = models.processing(found.model, task)
        prepared = prepared or prepare(data, processing, found.training.seed, folder=rows)
        refuse_metrics(tasks.of(prepared.task, None), found)
        resolved = resolve(found, prepared)
        settle(found, resolved, console, resume)
        run = Run(resolved, prepared, processing, console, signals)
        micro = found.training.micro_batch_size
        share = found.training.batch_size // several.num_processes
        size = share if micro == "auto" else micro
        while True:
            try:
                return run.attempt(size, resume)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0][:100]
            smaller = next((n for n in range(size - 1, 0, -1) if share % n == 0), 0)
            if micro != "auto" or not smaller or several.num_processes > 1:  # the others wait in the middle of a step
                raise RunError(
                    f"The memory does not hold {size} examples at once ({reason}). Set training.micro_batch_size lower "
                    "or leave it auto, set data.max_length lower, or training.gradient_checkpointing: true."
                )
            run.retries.append({"micro_batch_size": size, "error": reason})
            console.print(f"Out of memory with {size} examples at once; trying {smaller}, of the same steps.")
            size, resume = smaller, True
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _read(recipe: Recipe | Mapping[str, Any] | str | Path, overrides: Sequence[str]) -> Recipe:
    if isinstance(recipe, Recipe):
        if overrides:
            return recipes.read(recipe.yaml(), "the recipe", overrides)
        return recipe
    if isinstance(recipe, Mapping):
        return recipes.read(json.dumps(recipe), "the recipe", overrides)
    return recipes.load(recipe, overrides)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
