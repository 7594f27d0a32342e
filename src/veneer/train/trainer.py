"""transformers' Trainer as a recipe runs it: its own measuring, and checkpoints that are whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from veneer import sharding
from veneer.errors import Diverged
from veneer.seams import transformers
from veneer.store import write_tensors
from veneer.train import checkpoint
from veneer.train.compiling import CompiledBlocks
from veneer.train.frozen import FrozenBlocks
from veneer.train.order import Order
from veneer.train.tasks import Task
from veneer.train.watching import Best

ROW = "row_numbers"
WEIGHTS = "model.safetensors"  # the name under which a Trainer looks for what it goes on from


class Numbered(Dataset[Any]):
    """Rows that know their number, so that a bad batch can be named."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.rows[row], ROW: row}


class Collate:
    """A collator that hands the rows' numbers on."""

    def __init__(self, inner: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> None:
        self.inner = inner

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        numbers = [row.pop(ROW) for row in rows if ROW in row]
        batch = self.inner(rows)
        return batch | {ROW: torch.tensor(numbers)} if numbers else batch


class RecipeTrainer(Trainer):
    """A Trainer that measures with `measure`, takes the loss of `task` and rows in an `order`, keeps the last
    `keep` checkpoints, and what `frozen` blocks compute; it trains on `compiled` blocks where there are any."""

    def __init__(
        self,
        *,
        measure: Callable[[], dict[str, float]],
        task: Task,
        order: Order | None,
        make_optimizer: Callable[[], torch.optim.Optimizer],
        folder: Path,
        keep: int,
        advice: Callable[[], str],
        best: Best,
        frozen: FrozenBlocks | None = None,
        compiled: CompiledBlocks | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.folder = folder
        self.measure = measure
        self.task = task
        self.order = order
        self.make_optimizer = make_optimizer
        self.keep = keep
        self.advice = advice
        self.best = best
        self.frozen = frozen
        self.compiled = compiled
        self.add_callback(best)
        if order is not None:
            self.add_callback(order)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The adapter's optimizer, made here because a Trainer takes none from outside where it shares a model out."""
        if self.optimizer is None:
            self.optimizer = self.make_optimizer()
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        return self.order

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; Diverged where its loss is no number."""
        numbers = inputs.pop(ROW, None)
        step = self.state.global_step + 1
        serving = nullcontext() if self.frozen is None else self.frozen.serving(numbers.tolist(), inputs)
        compiled = nullcontext() if self.compiled is None else self.compiled.step(step)
        with serving, compiled:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            rows = "" if numbers is None else f" in a batch of training rows {', '.join(map(str, numbers.tolist()))}"
            raise Diverged(f"The loss became {loss.item()} at step {step}{rows}; {self.advice()}")
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task's own loss, where it has one: a mean over the rows of a micro-batch."""
        if self.task.loss is None:
            inputs = inputs | transformers.without_cache(self.model)  # a cache copies all keys and values once more
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self.task.loss(model, inputs)
        return (loss, None) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out figures, with `eval_` before their names."""
        metrics = {f"eval_{name}": value for name, value in self.measure().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def take_weights(self, folder: Path) -> None:
        """The adapter's weights of a checkpoint."""
        self._load_from_checkpoint(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = safetensors.torch.load_file(Path(resume_from_checkpoint) / WEIGHTS)
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        own = unwrapped.state_dict(keep_vars=True)
        found = {key: sharding.like(tensor, own[key]) if key in own else tensor for key, tensor in saved.items()}
        unwrapped.load_state_dict(found, strict=False)  # which lacks the base

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer, schedule = self._learning()
        state = optimizer.state_dict()
        whole = {number: _each(sharding.whole, kept) for number, kept in state["state"].items()}
        if self.args.should_save:
            torch.save(state | {"state": whole}, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        optimizer, schedule = self._learning()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, kept in state["state"].items():
            state["state"][number] = _each(partial(_beside, parameters[number]), kept)
        optimizer.load_state_dict(state)
        schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _learning(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        return self.optimizer, self.lr_scheduler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        def fill(aside: Path) -> None:
            self._save(str(aside))
            self._save_optimizer_and_scheduler(str(aside))
            self._save_scaler(str(aside))
            self._save_rng_state(str(aside))
            if self.args.should_save:
                self.state.save_to_json(str(aside / "trainer_state.json"))

        checkpoint.write(self.folder, self.state.global_step, fill, self.keep)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        state = model.state_dict()
        frozen = set(model._keys_to_ignore_on_save)
        kept = {key: sharding.whole(tensor.detach()) for key, tensor in state.items() if key not in frozen}
        if self.args.should_save:
            write_tensors(kept, Path(output_dir or self.folder) / WEIGHTS)


def _beside(parameter: Tensor, kept: Tensor) -> Tensor:
    """What is kept for each element of a parameter, shared out as that is; other things as they are."""
    return sharding.like(kept, parameter) if kept.shape == parameter.shape else kept


def _each(change: Callable[[Tensor], Tensor], kept: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer keeps for one parameter, each tensor changed."""
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in kept.items()}
