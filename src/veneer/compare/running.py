"""compare: every method with every seed under an equal budget, going on where an earlier call was stopped.

The folder holds `cells/METHOD/seed-N/` with the cell's description, its log, its run and `result.json`; what is
finished is not run again. Then `comparison.csv`, `.json`, `.html` are made of all results.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from veneer.compare.cells import MISTAKE
from veneer.compare.contenders import Contender, contenders
from veneer.errors import RecipeError, RunError, Stopped
from veneer.samples import whole
from veneer.train import checkpoint
from veneer.train.recipe import Recipe

BUDGETS = ("tokens", "seconds", "steps")
PROBE = 8
"""Steps by which the length of a step is measured where the budget is in seconds."""
FACTOR = 3.0
"""Neighbouring learning rates of a search are so many times apart."""


@dataclass(frozen=True)
class Budget:
    """What each run may use, equal for all: `amount` of "tokens", "seconds" of training steps, or "steps"."""

    unit: str
    amount: float

    @classmethod
    def read(cls, text: str) -> Budget:
        """From `tokens=200000`; RecipeError for any other text."""
        unit, _, amount = text.partition("=")
        try:
            found = cls(unit, float(amount))
        except ValueError:
            found = cls(unit, 0.0)
        if unit not in BUDGETS or not 0 < found.amount < float("inf"):
            raise RecipeError(f"'{text}' is no budget. Write one of: {', '.join(f'{each}=N' for each in BUDGETS)}.")
        return found

    def __str__(self) -> str:
        return f"{self.amount:,.12g} {self.unit}"


@dataclass(frozen=True)
class Search:
    """So many learning rates, FACTOR apart around the method's own, each tried for `share` of the steps."""

    rates: int
    share: float = 1 / 3

    @classmethod
    def read(cls, option: str, count: int) -> Search:
        """From `learning_rate 3`; RecipeError for anything else."""
        if option != "learning_rate":
            raise RecipeError(f"'{option}' cannot be searched for; only learning_rate can. Sweep other options.")
        if count < 2:
            raise RecipeError(f"A search among {count} learning rates chooses nothing. Search among 2 or more.")
        return cls(count)

    def around(self, rate: float) -> list[float]:
        """The rates to try, in rising order."""
        middle = (self.rates - 1) / 2
        return [float(f"{rate * FACTOR ** (place - middle):.3g}") for place in range(self.rates)]


@dataclass
class Outcome:
    """What became of one method: its results by seed, its searched rates with their losses, or why there are none."""

    contender: Contender
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    searched: dict[float, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass
class Comparison:
    """All outcomes, in the order of the methods asked for, and what was asked."""

    folder: Path
    recipe: Recipe
    outcomes: list[Outcome]
    seeds: int
    budget: Budget | None
    search: Search | None
    base: str


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    folder: Path,
    *,
    seeds: int = 3,
    budget: Budget | None = None,
    search: Search | None = None,
    sweep: Mapping[str, Sequence[str]] | None = None,
    rates: Mapping[str, float] | None = None,
    base: str | None = None,
    text: str | None = None,
    console: Console | None = None,
) -> Comparison:
    """Run the methods on a recipe's task, one after the other, each in its own process, and measure them.

    budget: that of each run; the recipe's own epochs or steps where it is None. search: choose each method's learning
    rate on a part of the training rows. sweep: option -> values, for the methods that have it. rates: method ->
    learning rate, in place of its own. base: the method that the others are compared with, pair by pair; the first
    one. text: a file of general text for what is forgotten.

    A method that fails is an outcome with its reason. Raises RecipeError for what cannot be compared, RunError where
    the folder holds another comparison, Stopped after Ctrl-C.
    """
    console = console or Console(stderr=True, highlight=False)
    entered = contenders(recipe, methods, sweep or {}, rates or {})
    base = base or entered[0].name
    if base not in [one.name for one in entered]:
        raise RecipeError(f"The base method '{base}' is not among {', '.join(one.name for one in entered)}.")
    if not recipe.data.held_out:
        raise RecipeError("Methods are compared on held-out rows. Set data.held_out to a fraction, a count or a file.")
    if recipe.data.streaming:
        raise RecipeError("Methods are compared on the same rows, example by example. Set data.streaming to false.")
    with checkpoint.locked(folder), _Worker() as worker:
        job = _Job(recipe, folder, seeds, budget, search, text, worker, console)
        outcomes = job.outcomes(entered)
    return Comparison(folder, recipe, outcomes, seeds, budget, search, base)


class _Worker:
    """The process that forks cells off itself."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()  # ends the cell at hand
            self.process.wait()

    def run(self, file: Path) -> int:
        """The exit code of a cell, negative for a signal."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "veneer.compare.cells"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            )
            self._answer()
        assert self.process.stdin is not None
        self.process.stdin.write(f"{file.resolve()}\n")
        self.process.stdin.flush()
        return int(self._answer())

    def _answer(self) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise RunError(f"The process that runs the methods ended by itself ({self.process.wait()}). Start it anew.")
        return answer


@dataclass
class _Job:
    recipe: Recipe
    folder: Path
    seeds: int
    budget: Budget | None
    search: Search | None
    text: str | None
    worker: _Worker
    console: Console

    def outcomes(self, entered: Sequence[Contender]) -> list[Outcome]:
        """Run what is not there yet, with a bar."""
        extra = (self.search.rates if self.search else 0) + (self.budget is not None and self.budget.unit == "seconds")
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs, "),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        with bar, self._interrupts():
            self.bar, self.task = bar, bar.add_task("", total=len(entered) * (self.seeds + extra))
            return [self._outcome(one, extra) for one in entered]

    @contextlib.contextmanager
    def _interrupts(self) -> Iterator[None]:
        before = signal.getsignal(signal.SIGTERM)

        def stop(number: int, frame: Any) -> None:
            raise KeyboardInterrupt

        try:
            signal.signal(signal.SIGTERM, stop)
            yield
        except KeyboardInterrupt:
            raise Stopped(
                f"Stopped; what is finished lies in {self.folder / 'cells'}. Go on by giving the same command again."
            ) from None
        finally:
            signal.signal(signal.SIGTERM, before)

    def _outcome(self, one: Contender, extra: int) -> Outcome:
        found, done = Outcome(one), 0
        try:
            told = self._told(one)
            if self.budget is not None and self.budget.unit == "seconds":
                probe = told | {"recipe": _with(told["recipe"], "training", steps=PROBE), "validation": True}
                result = self._cell(one, "probe", probe)
                done += 1
                steps = max(1, round(self.budget.amount / result["step_seconds"]))
                told["recipe"] = _with(told["recipe"], "training", steps=steps)
            if self.search is not None:
                for rate in self.search.around(told["recipe"]["training"]["learning_rate"]):
                    recipe = _with(told["recipe"], "training", learning_rate=rate)
                    trial = told | {"recipe": recipe, "share": self.search.share, "validation": True}
                    try:
                        found.searched[rate] = self._cell(one, f"search-{rate:g}", trial)["metrics"]["loss"]
                    except _Failed as failed:  # it may have diverged, which is an answer too
                        if failed.mistake:
                            raise
                        found.failures[f"learning rate {rate:g}"] = str(failed)
                    done += 1
                if not found.searched:
                    raise _Failed(next(iter(found.failures.values())), mistake=True)
                rate = min(found.searched, key=found.searched.__getitem__)
                told["recipe"] = _with(told["recipe"], "training", learning_rate=rate)
            for seed in range(self.seeds):
                recipe = _with(told["recipe"], "training", seed=self.recipe.training.seed + seed)
                try:
                    cell = told | {"recipe": recipe, "inference": seed == 0}
                    found.results[seed] = self._cell(one, f"seed-{seed}", cell)
                except _Failed as failed:
                    if failed.mistake:
                        raise
                    found.failures[f"seed {seed}"] = str(failed)
                done += 1
        except _Failed as failed:  # every other seed would fail as well
            found.failures["all"] = str(failed)
            self.bar.advance(self.task, self.seeds + extra - done)
        for what, why in found.failures.items():
            self.console.print(f"{one.name}, {what}: {why}")
        return found

    def _told(self, one: Contender) -> dict[str, Any]:
        """The description of a cell of this method, but for what differs between its cells."""
        recipe = self.recipe.as_dict()
        recipe.pop("record", None)
        recipe["method"] = {one.method: dict(one.options)}
        recipe["model"] = {key: value for key, value in recipe["model"].items() if key != "quantization"}
        if one.quantization is not None:
            recipe["model"]["quantization"] = one.quantization
        seed = self.recipe.data.seed if self.recipe.data.seed is not None else self.recipe.training.seed
        recipe["data"] = {"seed": seed} | recipe["data"]  # the same rows are held out for every seed
        own = self.recipe.training.learning_rate if one.method in self.recipe.as_dict()["method"] else None
        training = {key: value for key, value in recipe["training"].items() if key != "learning_rate"}
        training |= {"trackers": [], "keep_checkpoints": 1, "learning_rate": one.rate or own or one.learning_rate}
        recipe["training"] = training
        recipe["evaluation"] = {key: value for key, value in recipe["evaluation"].items() if key != "patience"}
        recipe["evaluation"]["keep"] = "last"  # to choose by the held-out rows, or to stop by them, would flatter
        budget: dict[str, float] = {}
        if self.budget is not None and self.budget.unit == "steps":
            recipe = _with(recipe, "training", steps=round(self.budget.amount))
        elif self.budget is not None and self.budget.unit == "tokens":
            budget = {"tokens": self.budget.amount}
        told = {"recipe": recipe, "budget": budget, "share": 1.0, "validation": False, "inference": False}
        told["text"] = None if self.text is None else str(Path(self.text).resolve())
        return json.loads(json.dumps(told))  # type: ignore[no-any-return]

    def _cell(self, one: Contender, name: str, told: dict[str, Any]) -> dict[str, Any]:
        """The result of a cell, run now unless it is there."""
        place = self.folder / "cells" / one.folder / name
        file, result = place / "cell.json", place / "result.json"
        self.bar.update(self.task, description=f"{one.name}, {name}")
        told["recipe"] = {key: value for key, value in told["recipe"].items() if key != "output"}
        if not result.exists():
            place.mkdir(parents=True, exist_ok=True)
            text = json.dumps(told, indent=1, ensure_ascii=False)
            whole.replace(file, lambda path: path.write_text(text, encoding="utf-8"))
            if not self.console.is_terminal:
                self.console.print(f"running {one.name}, {name}")
            code = self.worker.run(file)
            if code:
                raise _Failed(_reason(place / "log.txt", code), mistake=code == MISTAKE)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if found["cell"] != told:
            raise RunError(
                f"{place} holds a run by another recipe or budget. Name another output, or delete that folder."
            )
        self.bar.advance(self.task)
        return found


class _Failed(Exception):
    """A cell that came to nothing; a `mistake` would come to nothing with any seed."""

    def __init__(self, reason: str, mistake: bool) -> None:
        super().__init__(reason)
        self.mistake = mistake


def _reason(log: Path, code: int) -> str:
    if code < 0:
        what = signal.Signals(-code).name
        return f"its process was ended by {what}" + (", as for want of memory" if -code == signal.SIGKILL else "")
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:300] if lines else f"its process ended with exit code {code}"


def _with(recipe: dict[str, Any], section: str, **options: Any) -> dict[str, Any]:
    """A recipe with other options in a section; steps take the place of epochs."""
    changed = recipe[section] | options
    if "steps" in options:
        changed.pop("epochs", None)
    return recipe | {section: changed}
