"""Sequence to sequence: T5, BART and other models whose decoder writes about what their encoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from veneer.seams.quiet import quiet
from veneer.train.batch import by_length
from veneer.train.evaluate import evaluating, on_device
from veneer.train.metrics import WRITTEN
from veneer.train.tasks.task import Answered, Collate, Task, counted, decoded, perplexity

BATCH = 32


def ask(model: Any, processing: Any, rows: Sequence[dict[str, Any]], collate: Collate, longest: int) -> Answered:
    """What an encoder and a decoder make of the rows; `processing` decodes."""
    answers = [""] * len(rows)
    for group in by_length([row["length"] for row in rows], BATCH):
        batch = on_device(model, collate([rows[number] for number in group]))
        del batch["labels"]
        with evaluating(model), quiet():
            ids = model.generate(**batch, max_new_tokens=longest, do_sample=False, num_beams=1)
        for number, text in zip(group, processing.batch_decode(ids, skip_special_tokens=True), strict=True):
            answers[number] = text.strip()
    return Answered([_read(processing, row) for row in rows], answers, decoded(processing, rows))


def _read(processing: Any, row: dict[str, Any]) -> str:
    if "input_ids" in row:
        return str(processing.decode(row["input_ids"], skip_special_tokens=True))
    return str(row["audio"]["path"] or "a recording")


SEQ2SEQ = Task(
    "seq2seq",
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    metrics=("perplexity", *sorted(WRITTEN)),
    usual=("perplexity",),
    scored=counted,
    figures=perplexity,
    ask=ask,
)
