"""The loss curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from veneer.samples.packages import demo_extra
from veneer.train.progress import History


def draw(history: History, path: Path) -> None:
    """Writes a PNG: the training loss of each batch, smoothed, and the held-out loss where it was measured."""
    figure = demo_extra("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
    canvas = demo_extra("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)  # draws without a display
    axes = figure.add_subplot()
    steps, losses = [step for step, _ in history.training], [loss for _, loss in history.training]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1, label="training, each batch")
    axes.plot(steps, smoothed(losses), color="tab:blue", label="training, smoothed")
    if history.held_out:
        axes.plot(*zip(*history.held_out, strict=True), color="tab:orange", marker="o", label="held out")
    if history.rates:
        other = axes.twinx()
        other.plot(*zip(*history.rates, strict=True), color="tab:gray", linestyle=":", linewidth=1)
        other.set_ylabel("learning rate (dotted)")
        other.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    canvas.print_png(path)


def smoothed(losses: Sequence[float], weight: float = 0.9) -> list[float]:
    """An exponential moving average without the pull of a start at zero."""
    mean, mass, curve = 0.0, 0.0, []
    for loss in losses:
        mean, mass = weight * mean + (1 - weight) * loss, weight * mass + (1 - weight)
        curve.append(mean / mass)
    return curve
