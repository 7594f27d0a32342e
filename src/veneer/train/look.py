"""What a recipe or a file would train on, for people who look before they train."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from veneer.errors import DataError
from veneer.train import models
from veneer.train.data import report
from veneer.train.data.encode import tokenizer_of
from veneer.train.data.prepare import Prepared, prepare, recognize
from veneer.train.data.schema import Data
from veneer.train.recipe import Model, load

RECIPES = (".yaml", ".yml")


@dataclass(frozen=True)
class Seen:
    """A preparation and its first examples."""

    prepared: Prepared
    examples: list[Text]


def look(source: str, model: str, count: int) -> Seen:
    """Prepare what a recipe or file names, with the tokenizer of `model` or of the recipe's model."""
    data, own, seed = read(source)
    format_, task = recognize(data)
    if model:
        own = Model(name=model)
    if own is None:
        raise DataError(f"{source} is {format_} for {task}. Name the model by --tokenizer, a folder or an id.")
    processing = models.processing(own, task)
    prepared = prepare(data, processing, seed)
    tokenizer = None if prepared.task == "image_classification" else tokenizer_of(processing)
    rows = itertools.islice(prepared.train, count)
    return Seen(prepared, [report.shown(row, prepared.task, tokenizer, prepared.labels) for row in rows])


def read(source: str) -> tuple[Data, Model | None, int]:
    """(data, model, seed) of a recipe; of a file, folder or id, only the first."""
    if Path(source).suffix.lower() not in RECIPES:
        return Data.of(source), None, 0
    found = load(Path(source).expanduser())
    return found.data, found.model, found.training.seed
