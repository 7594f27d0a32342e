"""What fits into a device's memory, and what to change where nothing does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from veneer.errors import VeneerError
from veneer.plan.plan import Plan
from veneer.plan.tracing import SLACK, Counts
from veneer.quantizing import NF4
from veneer.seams import transformers

NEAR = 1.02
"""A larger answer than this is looked for once more."""
MOST = 2**20
"""Examples or tokens beyond which nobody looks."""


def largest_batch(plan: Plan, size: int) -> int:
    """The most examples whose expected peak is within `size` bytes; 0 where one is too much.

    All counts grow by the same for each example, so two plans tell all others; the answer is planned itself.
    """
    own = plan.setting.batch
    return _largest(plan, "batch_size", (own + 8, own), size, MOST)


def largest_sequence(plan: Plan, size: int) -> int:
    """The longest sequence whose expected peak is within `size` bytes, at most what the model has positions for.

    Counts grow with the length and with its square at most, so three plans tell all others; the answer is planned
    itself.
    """
    most = transformers.positions(plan.config) or MOST
    top = max(3, min(plan.setting.sequence, most))
    return _largest(plan, "sequence_length", (max(1, top // 4), max(2, top // 2), top), size, most)


def _largest(plan: Plan, option: str, points: tuple[int, ...], size: int, most: int) -> int:
    def at(n: int, counted: Counts | None = None) -> Plan:
        options: dict[str, Any] = {option: n}
        return plan.changed(counted, **options)

    def between(n: int) -> Counts:
        weights = {a: math.prod((n - b) / (a - b) for b in points if b != a) for a in points}
        return {key: sum(w * known[a].counted[key] for a, w in weights.items()) for key in plan.counted}

    def most_within(off: float) -> int:
        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            counted = between(middle)
            slack = max(0.0, counted.get(SLACK, 0.0)) * off
            fits = at(middle, counted | {SLACK: slack}).peak.expected <= size
            low, high = (middle, high) if fits else (low, middle)
        return low

    if plan.counted["weights"] + plan.counted["adapter"] > size:
        return 0
    known = {n: at(n) for n in points}
    best, off = 0, 1.0
    while (found := most_within(off)) > best * NEAR:
        planned = at(found)
        # What the allocator leaves unused wavers about its line, so the answer is planned, and the line moved to it.
        off = planned.counted.get(SLACK, 0.0) / max(1.0, between(found).get(SLACK, 0.0))
        while planned.peak.expected > size and (found := min(most_within(off), found - max(1, found // 50))) > best:
            planned = at(found)
        if found <= best:
            break
        best = found
    return best


@dataclass(frozen=True)
class Remedy:
    """A change and the plan that it makes."""

    change: str
    plan: Plan


def remedies(plan: Plan) -> list[Remedy]:
    """What lowers the peak, each change by itself and all together, with the plan that it makes; least peak first."""
    setting, trains = plan.setting, plan.setting.method is not None
    changes: dict[str, dict[str, Any]] = {}
    if trains and not setting.checkpointing:
        changes["checkpointing: activations computed again"] = {"checkpointing": True}
    if setting.quantization is None and setting.method != "full":
        changes["the base in 4 bits"] = {"quantization": NF4()}
    if trains and setting.loss == "whole":
        changes["the loss in chunks"] = {"loss": "chunked"}
    if trains and plan.optimizer == "adamw":
        changes["a paged optimizer"] = {"optimizer": "paged"}
    together = {key: value for change in changes.values() for key, value in change.items()}
    if len(changes) > 1:
        changes["all of these"] = together
    if setting.batch > 1:
        changes[f"a batch of {setting.batch // 2}, twice as many steps gathered"] = {"batch_size": setting.batch // 2}
    found = []
    for text, options in changes.items():
        try:
            changed = plan.changed(**options)
        except VeneerError:
            continue  # such as a loss that cannot be taken in chunks: no remedy for this model
        if changed.peak.expected < plan.peak.expected:
            found.append(Remedy(text, changed))
    return sorted(found, key=lambda remedy: remedy.plan.peak.expected)
