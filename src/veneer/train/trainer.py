"""transformers' Trainer as a recipe runs it: its own measuring, and checkpoints that are whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from veneer.errors import Diverged
from veneer.train import checkpoint
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
    """A Trainer that measures with `measure`, takes the loss of `task`, takes rows as they are or groups them by
    `lengths`, and keeps the last `keep` checkpoints."""

    def __init__(
        self,
        *,
        measure: Callable[[], dict[str, float]],
        task: Task,
        shuffle: bool,
        lengths: Sequence[int] | None,
        batch_size: int,
        folder: Path,
        keep: int,
        advice: Callable[[], str],
        best: Best,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.folder = folder
        self.measure = measure
        self.task = task
        self.shuffle = shuffle
        self.lengths = lengths
        self.batch_size = batch_size
        self.keep = keep
        self.advice = advice
        self.best = best
        self.add_callback(best)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if not self.shuffle and isinstance(self.train_dataset, Numbered):
            return SequentialSampler(self.train_dataset)
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(self.batch_size, lengths=list(self.lengths))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; Diverged where its loss is no number."""
        numbers = inputs.pop(ROW, None)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            rows = "" if numbers is None else f" in a batch of training rows {', '.join(map(str, numbers.tolist()))}"
            step = self.state.global_step + 1
            raise Diverged(f"The loss became {loss.item()} at step {step}{rows}; {self.advice()}")
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task's own loss, where it has one: a mean over the rows of a micro-batch."""
        if self.task.loss is None:
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        def fill(aside: Path) -> None:
            self._save(str(aside))
            self._save_optimizer_and_scheduler(str(aside))
            self._save_scaler(str(aside))
            self._save_rng_state(str(aside))
            self.state.save_to_json(str(aside / "trainer_state.json"))

        checkpoint.write(self.folder, self.state.global_step, fill, self.keep)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        state = model.state_dict()
        frozen = set(model._keys_to_ignore_on_save)
        kept = {key: tensor.detach().cpu().clone() for key, tensor in state.items() if key not in frozen}
        safetensors.torch.save_file(kept, Path(output_dir or self.folder) / WEIGHTS, metadata={"format": "pt"})
