"""A stacked bar for each plan: memory by part at the highest moment of its step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from veneer.plan.devices import GIB, Device
from veneer.plan.plan import PARTS, Plan


def draw(plans: Mapping[str, Plan], path: Path, device: Device | None = None) -> None:
    """Write a PNG; a line shows what the device holds, and a whisker the interval of the peak."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.9 * len(plans), 4.8), layout="constrained")
    axes = figure.subplots()
    highest = {name: plan.highest for name, plan in plans.items()}
    base = [0.0] * len(plans)
    for part in PARTS:
        sizes = [parts[part].expected / GIB for parts in highest.values()]
        axes.bar(list(plans), sizes, bottom=base, label=part)
        base = [a + b for a, b in zip(base, sizes, strict=True)]
    peaks = [plan.peak for plan in plans.values()]
    ends = [[(p.expected - p.low) / GIB for p in peaks], [(p.high - p.expected) / GIB for p in peaks]]
    axes.errorbar(list(plans), [p.expected / GIB for p in peaks], yerr=ends, fmt="none", ecolor="black", capsize=4)
    if device is not None:
        axes.axhline(device.memory / GIB, color="black", linestyle="--", label=device.name)
    axes.set_ylabel("GiB at the peak of a step")
    axes.tick_params(axis="x", rotation=45)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
