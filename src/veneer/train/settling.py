"""What a run fills into its recipe, and whether a folder was begun with the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from veneer.errors import RunError
from veneer.samples import whole
from veneer.train import recipe as recipes
from veneer.train.data import Prepared
from veneer.train.machine import commit, versions
from veneer.train.processes import processes
from veneer.train.recipe import EPOCHS, Recipe, Record

TENTH = 10
"""A run is measured and saved so often, where the recipe names no steps."""


def resolve(recipe: Recipe, prepared: Prepared) -> Recipe:
    """The recipe with what was left to the run filled in, and a record of what it was made with."""
    steps = recipe.training.steps or recipe.training.steps_over(len(prepared.train))
    tenth = max(1, steps // TENTH)
    training: dict[str, Any] = {
        "learning_rate": recipe.learning_rate,
        "checkpoint_every": recipe.training.checkpoint_every or tenth,
    }
    if recipe.training.epochs is None and recipe.training.steps is None:
        training["epochs"] = EPOCHS
    measured = prepared.held_out is not None
    evaluation: dict[str, Any] = {"every": recipe.evaluation.every or tenth} if measured else {}
    record = Record(
        versions=versions(),
        git=commit(),
        data_fingerprint=prepared.fingerprint,
        task=prepared.task,
        labels=prepared.labels,
        steps=steps,
    )
    return recipe.model_copy(
        update={
            "training": recipe.training.model_copy(update=training),
            "evaluation": recipe.evaluation.model_copy(update=evaluation),
            "record": record,
        }
    )


def settle(given: Recipe, resolved: Recipe, console: Console, resume: bool) -> None:
    """Compare a recipe with its record, and with the one its folder was begun with; write the resolved one there."""
    made, now, folder = given.record, resolved.record, Path(resolved.output)
    if made is not None and now is not None and made.data_fingerprint != now.data_fingerprint:
        raise RunError("The data are not those that this recipe was run with: their fingerprint differs. To train "
                       "on them all the same, delete the recipe's record.")  # fmt: skip
    for name, before in (made.versions if made else {}).items():
        here = versions().get(name)
        if here != before:
            console.print(f"{name} is {here}, and was {before} when this recipe was run.")
    file, text = folder / "recipe.yaml", resolved.yaml()
    if resume and file.exists():
        begun = recipes.read(file.read_text(encoding="utf-8"), str(file))
        changed = sorted(_differences(begun.as_dict(), resolved.as_dict()))
        if changed:
            raise RunError(
                f"{folder} was begun with another recipe: {', '.join(changed)} differ. Go on with "
                f"{file}, or name another output."
            )
    processes().wait_for_everyone()  # before the first writes what the others have read
    if processes().is_main_process:
        whole.replace(file, lambda path: path.write_text(text, encoding="utf-8"))


_NO_DIFFERENCE = (".output", ".record", ".training.parallel", ".training.micro_batch_size", ".training.compile")


def _differences(one: Any, other: Any, path: str = "") -> set[str]:
    """The places where two recipes say other things, but for where they write, by how many, and what made them."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {key for key in one.keys() | other.keys() if f"{path}.{key}" not in _NO_DIFFERENCE}
        return {each for key in keys for each in _differences(one.get(key), other.get(key), f"{path}.{key}")}
    return set() if one == other else {path.removeprefix(".")}
