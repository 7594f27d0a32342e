"""One line that tells how training goes, and the record of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.train.machine import device, peak_bytes

LINES = 10
"""How many plain lines are written where there is no terminal to draw a bar on."""


@dataclass
class History:
    """What happened during training: (step, loss) of each batch and of the held-out examples, rates, and the speed.

    `step_seconds` are of the optimizer steps alone; `seconds` counts what is measured and saved between them too.
    """

    training: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    rates: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, log: Sequence[dict[str, float]], before: float | None) -> History:
        """From a Trainer's log; `before` is the held-out loss of the base."""
        start = [] if before is None else [(0, before)]
        return cls(
            [(int(entry["step"]), entry["loss"]) for entry in log if "loss" in entry],
            start + [(int(entry["step"]), entry["eval_loss"]) for entry in log if "eval_loss" in entry],
            [(int(entry["step"]), entry["learning_rate"]) for entry in log if "learning_rate" in entry],
        )

    @property
    def tokens_per_second(self) -> float:
        """Tokens of prompts and answers, without padding, in each second of training."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Watch(TrainerCallback):
    """Shows a bar with loss, speed and time left, and fills a History.

    `probe` is called after the steps in `probe_at` and its result recorded as the held-out loss; the time it takes
    counts neither as training nor in the speed.
    """

    def __init__(
        self, console: Console, probe: Callable[[], float] | None = None, probe_at: Collection[int] = ()
    ) -> None:
        self.history = History()
        self.console = console
        self.probe = probe
        self.probe_at = frozenset(probe_at)
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            auto_refresh=False,  # drawn at each step, which needs no thread of its own
        )
        self.task = self.bar.add_task("training", total=None, figures="")
        self.started = 0.0
        self.first = (0, 0)
        self.paused = 0.0
        self.begun = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock of one step."""
        self.begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops it."""
        self.history.step_seconds.append(time.perf_counter() - self.begun)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()
        self.first = state.global_step, int(state.num_input_tokens_seen)  # of a run that goes on, what was done before
        self.bar.reset(self.task, total=state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Records and shows one step; the Trainer logs each of them, and a summary without a loss at the end."""
        if not logs or "loss" not in logs:
            return
        history, step = self.history, state.global_step
        history.training.append((step, logs["loss"]))
        history.tokens = int(state.num_input_tokens_seen) - self.first[1]
        history.seconds = time.perf_counter() - self.started - self.paused
        self._show(step, state.max_steps, logs["loss"])
        if self.probe is not None and step in self.probe_at:
            before = time.perf_counter()
            history.held_out.append((step, self.probe()))
            self.paused += time.perf_counter() - before

    def _show(self, step: int, steps: int, loss: float) -> None:
        history, memory = self.history, peak_bytes(device()) / 2**30
        figures = f"loss {loss:.3f}  {memory:.1f} GiB  {history.tokens_per_second:,.0f} tokens/s"
        if self.console.is_terminal:
            self.bar.update(self.task, completed=step, figures=f"{figures}  time left", refresh=True)
        elif step % max(1, steps // LINES) == 0 or step == steps:
            left = history.seconds / (step - self.first[0]) * (steps - step)
            self.console.print(f"step {step}/{steps}  {figures}  {left:.0f} s left")
