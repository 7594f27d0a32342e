"""Which method: constraints to a ranked list, every reason a computed figure or a cited one."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from veneer.delta import Method
from veneer.errors import MethodError, PlaceError, PlanError
from veneer.methods import BottleneckAdapter, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from veneer.plan.costs import Cost, cost
from veneer.plan.devices import GIB, MIB, Device, device

GIVEN = 2.0
"""Points of quality (of evidence.toml) that may be given for a shorter forward where one base serves several tasks.

A judgement: below 1.9 the usual advice, adapters for many tasks, would not come out."""


@dataclass(frozen=True)
class Candidate:
    """A way to train. quality: its key in evidence.toml. recipe, options: the method in a recipe."""

    name: str
    method: Method
    quality: str
    recipe: str
    options: str
    mergeable: bool
    four_bits: bool = False


CANDIDATES = (
    Candidate("full fine-tuning", FullFineTuning(), "full", "FullFineTuning", "{}", True),
    Candidate("LoRA", LoRA(rank=8), "lora", "LoRA", "{rank: 8}", True),
    Candidate("QLoRA", LoRA(rank=8), "lora", "LoRA", "{rank: 8}", True, four_bits=True),
    Candidate("adapters", BottleneckAdapter(), "adapters", "BottleneckAdapter", "{}", False),
    Candidate("prefix tuning", PrefixTuning(length=30), "prefix", "PrefixTuning", "{length: 30}", False),
    Candidate("prompt tuning", PromptTuning(length=20), "prompt", "PromptTuning", "{length: 20}", False),
)


@dataclass(frozen=True)
class Choice:
    """One method in the ranking. barred: why it cannot be, or empty. reasons: what speaks for and against it.

    cost: None where the method has no place in the model.
    """

    candidate: Candidate
    cost: Cost | None
    seconds: float | None
    reasons: tuple[str, ...]
    barred: tuple[str, ...]
    recipe: str

    @property
    def name(self) -> str:
        """The method's name."""
        return self.candidate.name

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        found = {"method": self.name, "possible": not self.barred, "barred": list(self.barred)}
        figures = self.cost and vars(self.cost) | {"share": self.cost.share, "step_seconds": self.seconds}
        return found | {"reasons": list(self.reasons), "cost": figures, "recipe": self.recipe}


@cache
def evidence() -> dict[str, Any]:
    """The citations, as evidence.toml has them."""
    return tomllib.loads(files("veneer.plan").joinpath("evidence.toml").read_text(encoding="utf-8"))


def choose(
    model: str | Path | Any,
    on: str | Device,
    *,
    batch: int = 1,
    length: int = 512,
    checkpointing: bool = True,
    zero_overhead: bool = False,
    tasks: int = 1,
    storage_per_task: int | None = None,
    most_parameters: float | None = None,
    quality_first: bool = False,
    examples: int | None = None,
    hours: float | None = None,
    data: str = "data.jsonl",
) -> list[Choice]:
    """Methods for a model on a device, the best first; those that a constraint or the model bars come last and say why.

    model: a preset (`llama:7b`), a folder, a Hub id or a config, of any architecture that takes token ids.

    zero_overhead: nothing may be left in a forward pass once trained. tasks: served from one base, switched by request.
    storage_per_task: bytes. most_parameters: the largest share of the base that may train. quality_first: the measured
    quality decides before cost. examples, hours: of training, once over; a method that takes longer is barred.

    Ranked by quality, where a difference counts only beyond the noise of its source (with `quality_first` any does);
    for several tasks then by the spots where a forward does more, and quality within two points counts as alike; then
    by the time of a step, then by memory.

    Raises PlanError for an unknown model or device, and for hours without examples or a device whose rate is known.
    """
    where = device(on) if isinstance(on, str) else on
    if (hours is None) != (examples is None):
        raise PlanError("hours and examples go together: so many examples in so many hours.")
    if hours is not None and where.rate("bfloat16") is None:
        raise PlanError(f"How fast {where.name} is, is not known, so hours cannot be planned; name a device.")
    found = []
    for candidate in CANDIDATES:
        recipe = _recipe(model, candidate, batch, length, checkpointing, data)
        settings = dict[str, Any](batch=batch, length=length, checkpointing=checkpointing)
        try:
            figures = cost(model, candidate.method, four_bits=candidate.four_bits, **settings)
        except (PlaceError, MethodError) as error:
            found.append(Choice(candidate, None, None, (), (str(error),), recipe))
            continue
        seconds = _seconds(figures, candidate, where)
        barred = []
        if figures.peak > where.memory:
            barred.append(
                f"needs {figures.peak / GIB:.1f} GiB at {batch} × {length}, {where.memory / GIB:.1f} are there"
            )
        if zero_overhead and not candidate.mergeable:
            barred.append(f"cannot be merged: {figures.sites} spots of a forward do more for good")
        if tasks > 1 and candidate.quality == "full":
            barred.append(f"{tasks} tasks are {tasks} models of {figures.saved / GIB:.2f} GiB, not one base")
        if storage_per_task is not None and figures.saved > storage_per_task:
            barred.append(f"{figures.saved / MIB:.1f} MiB a task, {storage_per_task / MIB:.1f} are allowed")
        if most_parameters is not None and figures.share > most_parameters:
            barred.append(f"trains {figures.share:.3%} of the parameters, {most_parameters:.3%} are allowed")
        if hours is not None and examples is not None and seconds is not None:
            needed = seconds * examples / batch / 3600
            if needed > hours:
                barred.append(f"{needed:.1f} hours for {examples} examples, {hours:.1f} are allowed")
        reasons = tuple(_reasons(candidate, figures, seconds, tasks, zero_overhead))
        found.append(Choice(candidate, figures, seconds, reasons, tuple(barred), recipe))
    return sorted(found, key=lambda choice: _rank(choice, quality_first, tasks))


def _rank(choice: Choice, quality_first: bool, tasks: int) -> tuple[float, ...]:
    table = evidence()["quality"]
    behind = table["full"] - table[choice.candidate.quality]
    lost = behind if quality_first else (0.0 if behind <= table["noise"] else behind)
    if choice.cost is None:
        return (2.0,)
    spots = choice.cost.sites if tasks > 1 else 0
    work = choice.cost.flops if choice.seconds is None else choice.seconds
    if tasks > 1 and not quality_first and behind <= GIVEN:
        lost = 0.0
    return (float(bool(choice.barred)), lost, spots, work, choice.candidate.four_bits, choice.cost.peak)


def _seconds(figures: Cost, candidate: Candidate, where: Device) -> float | None:
    """Of arithmetic, and of reading and writing: weights for each pass, made dense where they are packed."""
    rate, bandwidth = where.rate("bfloat16"), where.bandwidth
    if rate is None or bandwidth is None:
        return None
    moved = 3 * figures.weights + (3 * 2 * 2 * figures.total if candidate.four_bits else 0)
    return figures.flops / rate + moved / bandwidth


def _reasons(
    candidate: Candidate, figures: Cost, seconds: float | None, tasks: int, zero_overhead: bool
) -> Sequence[str]:
    table = evidence()
    found = [
        f"computed: {figures.peak / GIB:.1f} GiB at the peak ({figures.weights / GIB:.1f} weights, "
        f"{figures.trained / GIB:.2f} trained with gradients and moments, {figures.activations / GIB:.1f} activations, "
        f"{figures.overhead / GIB:.1f} CUDA's context and allocator)",
        f"computed: {figures.trainable:,} parameters train ({figures.share:.3%}), {figures.saved / MIB:.1f} MiB a task",
        f"cited: quality {table['quality'][candidate.quality]} where full fine-tuning has {table['quality']['full']} "
        f"({table['quality']['source']})",
    ]
    if seconds is not None:
        found.append(f"computed: {seconds:.2f} s a step at the rates of the data sheet, at best")
    if candidate.four_bits:
        four = table["qlora"]
        found.append(f"cited: four bits {four['four']}, sixteen {four['sixteen']} ({four['source']})")
    if zero_overhead and candidate.mergeable and candidate.quality != "full":
        kept = "; merged, the base is in 16 bits again" if candidate.four_bits else ""
        found.append(f"computed: none of {figures.sites} spots is left once merged{kept}")
    if tasks > 1:
        found.append(f"computed: {figures.sites} spots of a forward do more, unmerged, for each request")
    return found


def advice(choices: Sequence[Choice], *, tasks: int = 1, quality_first: bool = False) -> list[str]:
    """Where later evidence differs from the usual advice for what came first."""
    modern, first = evidence()["modern"], choices[0].candidate
    found = [modern["targets"]] if first.quality == "lora" else []
    if first.name == "QLoRA":
        found.insert(0, modern["lora-24gb"])
    if tasks > 1:
        found.append(modern["tasks"])
    if first.quality in ("prefix", "prompt"):
        found.append(modern["prefix"])
    if first.quality == "full" or quality_first:
        found.append(modern["full"])
    return found


def _recipe(
    model: str | Path | Any, candidate: Candidate, batch: int, length: int, checkpointing: bool, data: str
) -> str:
    """YAML that `veneer train` takes; a preset has no weights, so `model.name` is to be set to a folder or Hub id."""
    quantization = ", quantization: nf4" if candidate.four_bits else ""
    name = model if isinstance(model, str | Path) else model.name_or_path or "MODEL"
    short = candidate.name.replace(" ", "-").lower()
    lines = (
        f"model: {{name: '{name}', dtype: bfloat16{quantization}}}",
        "method:",
        f"  {candidate.recipe}: {candidate.options}",
        f"data: {{path: {data}, max_length: {length}}}",
        f"training: {{batch_size: {batch}, gradient_checkpointing: {str(checkpointing).lower()}}}",
        f"output: runs/{short}",
    )
    return "\n".join(lines) + "\n"
