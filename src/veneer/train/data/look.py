"""What a recipe or a file would train on, for people who look before they train."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from veneer.errors import DataError
from veneer.samples import named
from veneer.samples.quiet import quiet
from veneer.train.data import report
from veneer.train.data.encode import tokenizer_of
from veneer.train.data.prepare import Prepared, prepare, recognize
from veneer.train.data.schema import Data

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
    model = model or own
    if not model:
        raise DataError(f"{source} is {format_} for {task}. Name the model by --tokenizer, a folder or an id.")
    processing = load_processing(model, task)
    prepared = prepare(data, processing, seed)
    tokenizer = None if prepared.task == "image_classification" else tokenizer_of(processing)
    rows = itertools.islice(prepared.train, count)
    return Seen(prepared, [report.shown(row, prepared.task, tokenizer, prepared.labels) for row in rows])


def read(source: str) -> tuple[Data, str, int]:
    """(data, model, seed) of a recipe; of a file, folder or id, only the first."""
    path = Path(source).expanduser()
    if path.suffix.lower() not in RECIPES:
        return Data.of(source), "", 0
    import yaml

    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as wrong:
        raise DataError(f"{path} is not YAML: {str(wrong).splitlines()[-1].strip()}.") from wrong
    if not isinstance(recipe, dict) or "data" not in recipe:
        raise DataError(f"{path} has no section 'data'.")
    model: Any = recipe.get("model") or ""
    if isinstance(model, dict):
        model = model.get("name") or ""
    training = recipe.get("training")
    seed = training.get("seed", 0) if isinstance(training, dict) else 0
    return Data.of(recipe["data"], path.parent), str(model), seed if isinstance(seed, int) else 0


def load_processing(model: str, task: str) -> Any:
    """The tokenizer of a model; for images its image processor, for speech its processor with both."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    kinds: dict[str, Any] = {"image_classification": AutoImageProcessor, "speech": AutoProcessor}
    kind = kinds.get(task, AutoTokenizer)
    place = Path(named.located(model)).expanduser()
    try:
        with quiet():
            return kind.from_pretrained(place if place.is_dir() else model)
    except (OSError, ValueError) as wrong:
        raise DataError(
            f"{model} has no {kind.__name__.removeprefix('Auto')} here: {str(wrong).splitlines()[0]}"
        ) from wrong
