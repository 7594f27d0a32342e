"""An adapter that a recipe made, on its base again: to be measured, and to answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import veneer
from veneer.errors import FileError, RecipeError
from veneer.train import answering, models, recipe, tasks
from veneer.train.chatting import Chat, converse
from veneer.train.data import prepare
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


def figures(adapter: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, float], dict[str, float]]:
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

    def measured() -> dict[str, float]:
        size, evaluation = found.training.batch_size, found.evaluation
        plain = measure(model, prepared.held_out, prepared.collate, task, size, evaluation.metrics)
        rows, seed = prepared.held_out, found.training.seed
        return plain | score(model, tokenizer, rows, prepared.collate, task, evaluation, seed).metrics

    with veneer.use(model):
        base = measured()
    return base, measured()


def answers(adapter: Path, asked: Sequence[str], max_new_tokens: int = 128, system: str | None = None) -> list[str]:
    """What the adapted model answers to each input, as `answering` says; `system` is the recipe's where it is None."""
    found, model, processing = opened(adapter)
    assert found.record is not None
    name, labels = found.record.task, found.record.labels
    if name in answering.CHATS:
        return answering.prompts(model, processing, asked, _system(found, system), max_new_tokens)
    if system is not None:
        raise FileError(f"{adapter} adapts a model that takes no system message. Leave it out.")
    return answering.inputs(name, model, processing, labels, asked, max_new_tokens)


def chat(
    adapter: Path, max_new_tokens: int, system: str | None, read: Callable[[], str], say: Callable[[str], None]
) -> None:
    """A conversation with the adapted model: it reads questions until there are no more, and says the answers."""
    found, model, tokenizer = opened(adapter)
    if found.record is None or found.record.task not in answering.CHATS:
        raise FileError(f"{adapter} adapts a model that holds no conversation. Give it one input, or --file.")
    converse(Chat(model, tokenizer, _system(found, system), max_new_tokens, say), read)


def _system(found: Recipe, told: str | None) -> str:
    return (found.data.system or "") if told is None else told
