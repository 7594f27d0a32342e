"""An adapter that a recipe made, on its base again: to be measured, and to answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import veneer
from veneer.errors import FileError, RecipeError
from veneer.train import models, recipe, tasks
from veneer.train.data import prepare
from veneer.train.evaluate import write
from veneer.train.examples import Example, encode_prompt
from veneer.train.measure import measure
from veneer.train.recipe import Recipe
from veneer.train.refusing import refuse_metrics
from veneer.train.scores import score


def opened(adapter: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Any, Any]:
    """(recipe, model with the adapter attached, tokenizer) of a folder that `veneer train` made."""
    file = adapter / "recipe.yaml"
    if not file.exists():
        raise FileError(f"{adapter} holds no recipe.yaml, so no recipe made it. Name a folder such as runs/x/adapter.")
    found = recipe.load(file, overrides)
    if found.record is None:
        raise FileError(f"{file} has no record of a run. Restore it from where it came from.")
    model, _ = models.base(found.model, found.record.task, found.record.labels)
    veneer.load(model, adapter)
    return (
        found,
        model.eval(),
        models.processing(found.model.model_copy(update={"name": str(adapter), "revision": None}), found.record.task),
    )


def compare(adapter: Path, overrides: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """The figures of the base alone and with the adapter, on held-out rows."""
    found, model, tokenizer = opened(adapter, overrides)
    assert found.record is not None
    prepared = prepare(found.data, tokenizer, found.training.seed)
    if prepared.held_out is None:
        raise RecipeError(
            "There are no held-out rows to measure on. Set data.held_out to a fraction, a count or a file."
        )
    if prepared.labels != found.record.labels:
        raise RecipeError(f"The rows have the labels {prepared.labels}, and the adapter {found.record.labels}.")

    task = tasks.of(prepared.task, found.training.dpo_beta)
    refuse_metrics(task, found)
    models.chunked(model, "auto")

    def figures() -> dict[str, float]:
        size, evaluation = found.training.batch_size, found.evaluation
        plain = measure(model, prepared.held_out, prepared.collate, task, size, evaluation.metrics)
        rows, seed = prepared.held_out, found.training.seed
        return plain | score(model, tokenizer, rows, prepared.collate, task, evaluation, seed).metrics

    with veneer.use(model):
        base = figures()
    return base, figures()


def answer(adapter: Path, prompts: Sequence[str], max_new_tokens: int, system: str | None = None) -> list[str]:
    """What the adapted model writes to each prompt, greedily; `system` is the recipe's where it is None."""
    found, model, tokenizer = opened(adapter)
    if found.record is None or found.record.task not in ("causal", "preference"):
        raise FileError(f"{adapter} does not adapt a model that writes. Measure it with: veneer eval {adapter}")
    system = (found.data.system or "") if system is None else system
    encoded = [encode_prompt(tokenizer, Example(prompt, "", system)) for prompt in prompts]
    return write(model, tokenizer, encoded, max_new_tokens=max_new_tokens)
