"""Examples of different lengths as one batch, padded on the left.

On the left, because then every answer ends in the last column: the head, which for a small model with a large
vocabulary is a third of the work and most of the memory, need only run on the last few columns
(`logits_to_keep`), and a batch for training looks like a batch for generation.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.train.encoding import IGNORED, Encoded


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
        """`labels` covers the last columns only where the model can keep its logits to these."""
        labels = pad_left([row["labels"] for row in rows], IGNORED)
        batch = self.prompts([row["input_ids"] for row in rows])
        if "logits_to_keep" in self.accepted:
            first = int((labels != IGNORED).any(dim=0).nonzero()[0])
            kept = torch.arange(first - 1, labels.shape[1])  # the token before the answer predicts its first one
            labels = labels[:, first - 1 :].contiguous()
            batch["logits_to_keep"] = (
                kept  # as indices: a number makes a strided slice, and the head three times slower
            )
        return batch | {"labels": labels}

    def prompts(self, rows: Sequence[list[int]]) -> dict[str, Any]:
        """Token ids alone, with the mask and the positions that padding calls for."""
        mask = pad_left([[1] * len(row) for row in rows], 0)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        batch = {"input_ids": pad_left(rows, self.padding), "attention_mask": mask, "position_ids": positions}
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
