"""Measures a few training steps on this machine, and fits to them how much of its rates a step reaches."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer.methods import LoRA
from veneer.plan.constants import Constants, constants, keep
from veneer.plan.devices import Device, this_machine
from veneer.plan.tracing import Setting, counts, inputs, loss_of, train_by
from veneer.seams import loading
from veneer.seams.transformers import config_with

SHAPES = (
    (64, 1, 32),
    (256, 2, 64),
    (128, 4, 64),
    (384, 1, 256),
    (64, 8, 32),
    (256, 4, 128),
    (384, 2, 64),
    (128, 2, 256),
)
"""(width, examples, tokens) of the steps; every second one is held out from the fit."""
STEPS = 5


@dataclass(frozen=True)
class Calibration:
    """The mean relative error of the time of held-out steps, before and after; what was fitted, where it is kept."""

    device: Device
    before: float
    after: float
    constants: Constants
    path: Path


@dataclass(frozen=True)
class _Step:
    terms: tuple[float, float, float]
    seconds: float

    def error(self, known: Constants) -> float:
        said = self.terms[0] / known.products + self.terms[1] / known.bandwidth + self.terms[2] * known.call
        return abs(said / self.seconds - 1)


def calibrate() -> Calibration:
    """Run the steps, in float32 on a CPU and in bfloat16 elsewhere, fit, and store what was fitted for later plans."""
    device = this_machine()
    steps = list(_steps(device))
    fitted, held = steps[::2], steps[1::2]
    before = _mean([step.error(constants(device)) for step in held])
    made = _fit(fitted)
    errors = [step.error(made) for step in held]
    known = Constants(made.products, made.bandwidth, made.call, 1 + max(0.1, *errors), True)
    return Calibration(device, before, _mean(errors), known, keep(device, known))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _steps(device: Device) -> Iterator[_Step]:
    dtype = torch.float32 if device.kind == "cpu" else torch.bfloat16
    rate, bandwidth = device.rate(str(dtype).removeprefix("torch.")), device.bandwidth
    assert rate is not None
    assert bandwidth is not None
    for width, batch, length in SHAPES:
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4, "num_attention_heads": 4}
        config: Any = config_with("llama", "LlamaForCausalLM", {"vocab_size": 2048, **sizes})
        setting = Setting(LoRA(rank=8), None, batch, length, dtype, None, False, "whole", device.kind, None)
        counted = counts(config, setting)[0]
        terms = counted["flops"] / rate, counted["moved"] / bandwidth, counted["calls"]
        yield _Step(terms, _measured(config, setting))


def _measured(config: Any, setting: Setting) -> float:
    """The least of a few steps' seconds."""
    with torch.random.fork_rng():
        model: Any = loading.class_of(config)(copy.deepcopy(config)).to(setting.dtype)
    model = model.to(setting.kind)
    train_by(model, setting)
    ids = {name: torch.ones_like(each, device=setting.kind) for name, each in inputs(config, setting).items()}
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        loss_of(model, ids).backward()
        if setting.kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _fit(steps: Sequence[_Step]) -> Constants:
    """Least squares of the relative errors, over the terms that come out positive."""
    rows = torch.tensor([[term / step.seconds for term in step.terms] for step in steps], dtype=torch.float64)
    best, least = torch.zeros(3, dtype=torch.float64), float("inf")
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            some = list(chosen)
            ones = torch.ones(len(steps), 1, dtype=torch.float64)
            found = torch.linalg.lstsq(rows[:, some], ones).solution.flatten()
            lost = float((rows[:, some] @ found - 1).square().sum())
            if (found > 0).all() and lost < least:
                best, least = torch.zeros(3, dtype=torch.float64), lost
                best[some] = found
    products, bandwidth, call = (max(float(each), 1e-9) for each in best)
    return Constants(1 / products, 1 / bandwidth, call)
