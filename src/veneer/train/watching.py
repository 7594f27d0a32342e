"""What watches over a run: a loss that is no number or explodes, signals to stop, the best adapter so far, patience."""

from __future__ import annotations

import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer import Adapter, files
from veneer.errors import Diverged, RunError
from veneer.samples import whole
from veneer.store import write_tensors
from veneer.train.processes import largest, processes

WINDOW, TIMES, BEYOND = 20, 10.0, 10.0
"""A loss explodes when it is TIMES the mean of the last WINDOW ones, and more than BEYOND above it."""


class Sanity(TrainerCallback):
    """Raises Diverged at the first step whose loss is out of all proportion to those before."""

    def __init__(self, advice: Callable[[], str]) -> None:
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.advice = advice

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare one step's loss with the last ones."""
        if not logs or "loss" not in logs:
            return
        loss, mean = logs["loss"], sum(self.recent) / max(1, len(self.recent))
        if not math.isfinite(loss) or (self.recent and loss > TIMES * mean and loss > mean + BEYOND):
            raise Diverged(f"The loss became {loss:.3g} at step {state.global_step}, after {mean:.3g}; {self.advice()}")
        self.recent.append(loss)


class Best(TrainerCallback):
    """Keeps the adapter with the lowest held-out loss in a file, and ends a run whose loss falls no more.

    What it knows lies in the Trainer's state, so a run that goes on from a checkpoint ends as an undisturbed one.
    """

    def __init__(self, adapter: Adapter, file: Path | None, patience: int | None) -> None:
        self.adapter = adapter
        self.file = file
        self.patience = patience

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Judge one evaluation."""
        loss = (metrics or {})["eval_loss"]
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric, state.best_global_step = loss, state.global_step
            if self.file is not None:
                tensors = self.adapter.state_dict()
                if state.is_world_process_zero:
                    whole.replace(self.file, partial(write_tensors, tensors))
                    files.sync(self.file.parent)
        elif self.lost(state):
            control.should_training_stop = True

    def lost(self, state: TrainerState) -> bool:
        """Whether a run has been patient for long enough."""
        best = state.best_global_step
        if self.patience is None or best is None:
            return False
        return sum("eval_loss" in entry and entry["step"] > best for entry in state.log_history) >= self.patience

    def take_back(self) -> None:
        """Give the adapter the weights it was best with."""
        if self.file is None:
            return
        processes().wait_for_everyone()  # the first writes it
        if not self.file.exists():
            raise RunError(f"{self.file} is gone, which held the best adapter so far. Run the recipe anew.")
        self.adapter.load_state_dict(safetensors.torch.load_file(self.file))


class Signals(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the step at hand, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None

    @contextmanager
    def caught_here(self) -> Iterator[None]:
        """Within, the signals are taken; only Python's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: Any) -> None:
        if self.caught == number:  # torchrun passes Ctrl-C on as SIGTERM: another one is no second one
            raise KeyboardInterrupt
        self.caught = self.caught or signal.Signals(number)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if a signal came to any of the processes."""
        if number := largest(self.caught or 0):
            self.caught = signal.Signals(number)
            control.should_save = control.should_training_stop = True
