"""Examples of different lengths as one batch, padded on the left.

On the left, because then every answer ends in the last column: the head, which for a small model with a large
vocabulary is a third of the work and most of the memory, need only run on the last few columns (`logits_to_keep`),
and a batch for training looks like a batch for generation.

The columns are always given as indices. A number makes a strided slice of the hidden states, and torch multiplies that
with a frozen head as one copy of the head a row: 2.6 GB for 50 rows of SmolLM2, where an index copies 60 kB.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.train.labels import IGNORED, Encoded


@dataclass(frozen=True)
class Collator:
    """Turns encoded examples into the arguments of one model's `forward`."""

    padding: int
    accepted: frozenset[str]

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """The collator for this model: arguments that its `forward` does not know are left out."""
        return cls(padding_id(tokenizer), frozenset(inspect.signature(model.forward).parameters))

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """A batch to learn from. `labels` covers the last columns only, where the model can keep its logits to them."""
        ids, mask = self._padded([row["input_ids"] for row in rows])
        labels = pad_left([row["labels"] for row in rows], IGNORED)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        first = max(0, int((labels != IGNORED).any(dim=0).nonzero()[0]) - 1)  # what predicts the first answer token
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if "logits_to_keep" in self.accepted:
            batch["logits_to_keep"] = torch.arange(first, labels.shape[1])
            labels = labels[:, first:].contiguous()
        return self._accepted(batch) | {"labels": labels}

    def questions(self, rows: Sequence[list[int]]) -> dict[str, Any]:
        """A batch to be answered by `generate`, which needs the logits of the last column only."""
        ids, mask = self._padded(rows)
        return self._accepted({"input_ids": ids, "attention_mask": mask, "logits_to_keep": torch.tensor([-1])})

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        return pad_left(rows, self.padding), pad_left([[1] * len(row) for row in rows], 0)

    def _accepted(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name in self.accepted}


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills a row; which one does not matter, because it is masked everywhere."""
    chosen = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(chosen) if chosen is not None else 0


def pad_left(rows: Sequence[list[int]], filling: int) -> Tensor:
    """Rows of different lengths as one tensor."""
    width = max(len(row) for row in rows)
    return torch.tensor([[filling] * (width - len(row)) + row for row in rows])


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The row numbers in batches of similar length, so that little is padding; the longest first."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + size] for start in range(0, len(order), size)]
