"""Rows as a batch, for the Trainer's `data_collator`: padded on the right, by what each task takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.train.data import media
from veneer.train.labels import IGNORED

Rows = Sequence[dict[str, Any]]
Batch = dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """input_ids, attention_mask, labels, and token_type_ids where the tokenizer makes them.

    `padding` fills input_ids; labels are padded with -100, and single ones are a class (int64) or a number (float32).
    """

    padding: int

    def __call__(self, rows: Rows) -> Batch:
        ids = [row["input_ids"] for row in rows]
        batch = {"input_ids": padded(ids, self.padding), "attention_mask": padded([[1] * len(row) for row in ids], 0)}
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = padded([row["token_type_ids"] for row in rows], 0)
        return batch | {"labels": targets([row["labels"] for row in rows])}


@dataclass(frozen=True)
class Packed:
    """input_ids, position_ids and labels of packed rows, without a mask and without a cache.

    `flat`: as one row, which is the only form in which flash attention keeps examples apart.
    """

    padding: int
    flat: bool = False

    def __call__(self, rows: Rows) -> Batch:
        fillings = {"input_ids": self.padding, "labels": IGNORED}
        if self.flat:
            joined = {name: [[value for row in rows for value in row[name]]] for name in ("position_ids", *fillings)}
            return {name: torch.tensor(values) for name, values in joined.items()} | {"use_cache": False}
        batch: Batch = {name: padded([row[name] for row in rows], filling) for name, filling in fillings.items()}
        width = batch["input_ids"].shape[1]  # what fills a row is an example of its own, whose positions start at 0
        positions = [[*row["position_ids"], *range(width - len(row["position_ids"]))] for row in rows]
        return batch | {"position_ids": torch.tensor(positions), "use_cache": False}


@dataclass(frozen=True)
class Preferences:
    """Chosen answers in the first half of the batch, rejected ones in the second, as TRL's DPOTrainer takes them:
    input_ids, attention_mask, and completion_mask, 1 on the answers."""

    padding: int

    def __call__(self, rows: Rows) -> Batch:
        answers = [(row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
        return {
            "input_ids": padded([prompt + answer for prompt, answer in answers], self.padding),
            "attention_mask": padded([[1] * len(prompt + answer) for prompt, answer in answers], 0),
            "completion_mask": padded([[0] * len(prompt) + [1] * len(answer) for prompt, answer in answers], 0),
        }


@dataclass(frozen=True)
class Pictures:
    """pixel_values of an image processor, and labels. Images are read when their batch is made."""

    processor: Any

    def __call__(self, rows: Rows) -> Batch:
        images = [media.image(row["image"]) for row in rows]
        batch = self.processor(images=images, return_tensors="pt")
        return {**batch, "labels": targets([row["labels"] for row in rows])}


@dataclass(frozen=True)
class Recordings:
    """What a feature extractor makes of recordings (input_features or input_values), and labels."""

    extractor: Any

    def __call__(self, rows: Rows) -> Batch:
        rate = self.extractor.sampling_rate
        sounds = [media.recording(row["audio"], rate) for row in rows]
        # Whisper's encoder takes windows of one length only, to which its extractor pads by default
        options = {} if "input_features" in self.extractor.model_input_names else {"padding": True}
        batch = self.extractor(sounds, sampling_rate=rate, return_tensors="pt", **options)
        return {**batch, "labels": padded([row["labels"] for row in rows], IGNORED)}


def targets(values: Sequence[Any]) -> Tensor:
    """One class or number a row, or a row of labels each."""
    return padded(values, IGNORED) if isinstance(values[0], list) else torch.tensor(values)


def padded(rows: Sequence[list[int]], filling: int) -> Tensor:
    """Rows of different lengths as one tensor (row, place)."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [filling] * (width - len(row)) for row in rows])
