"""The order in which rows are trained on: new in each epoch, and the same for each seed, epoch and number of processes.

It is drawn from no global random state, which a run that goes on has in another place than an undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices


class Order(Sampler[int], TrainerCallback):
    """Rows shuffled, with those of like length together where lengths are known; a callback that follows the epochs."""

    def __init__(
        self, rows: int, batch_size: int, lengths: Sequence[int] | None, seed: int, shuffle: bool = True
    ) -> None:
        self.shuffle = shuffle
        self.rows, self.batch_size, self.lengths, self.seed = rows, batch_size, lengths, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.rows))
        drawn = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=drawn).tolist())
        return iter(get_length_grouped_indices(list(self.lengths), self.batch_size, generator=drawn))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Another epoch, or the rest of one that was begun."""
        self.epoch = state.global_step // math.ceil(self.rows / self.batch_size)
