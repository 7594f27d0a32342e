"""From the `data` section of a recipe to what a Trainer takes: rows, a collator, a report of what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import DataError, listed
from veneer.train.batch import padding_id
from veneer.train.data import collate, formats, options, sources
from veneer.train.data.chat import PLAIN
from veneer.train.data.encode import Columns, Encoder, tokenizer_of
from veneer.train.data.job import Job
from veneer.train.data.report import Report
from veneer.train.data.schema import Data
from veneer.train.data.sources import Row, Source
from veneer.train.data.streaming import stream
from veneer.train.data.whole import whole


@dataclass
class Prepared:
    """What to train on.

    train, held_out: a datasets.Dataset, or an IterableDataset when streaming; held_out is None without held-out rows.
    collate: rows -> batch, for the Trainer's `data_collator`; it needs `remove_unused_columns=False`.
    task: causal, sequence_classification, regression, seq2seq, preference, image_classification or speech.
    labels: names of the classes, by number; None for other tasks and for regression.
    packed: rows hold several examples; `check_packing(model)` before training.
    fingerprint: SHA-256 of the source; the same rows have the same.
    """

    train: Any
    held_out: Any
    collate: Callable[[Sequence[Columns]], dict[str, Any]]
    task: str
    labels: list[str] | None
    packed: bool
    fingerprint: str
    report: Report


def recognize(data: Data) -> tuple[str, str]:
    """(format, task) of what a recipe names, from its first row; needs no tokenizer.

    Numbers as labels make the task "regression" only when all rows are read; it is "sequence_classification" here.
    """
    name, _ = _format(data, _source(data))
    return name, formats.FORMATS[name].task


def prepare(
    data: Data, processing: Any, seed: int = 0, *, attention: str = "sdpa", folder: Path | None = None
) -> Prepared:
    """Read, check, split and encode what a recipe names.

    processing: a tokenizer; for images an image processor; for speech a processor with both. A tokenizer without a chat
        template gets the plain one of `chat.PLAIN`, or the recipe's, for conversations: save it with the model.
    seed: chooses held-out rows and order, where the recipe's `data` has no seed of its own.
    attention: the attention implementation of the model; with "flash" in it, packed rows are joined into one.
    folder: where the encoded rows lie; by default a temporary folder, gone with this process.

    Errors:
        DataError with a line for each mistake: file, line, field, the nearest name; TemplateError for a template.
    """
    source = _source(data)
    name, first = _format(data, source)
    options.check_options(data, name)
    seed = data.seed if data.seed is not None else seed
    task = formats.FORMATS[name].task
    options.check_processing(task, processing)
    template = options.template(data, name, processing, first)
    max_length = options.max_length(data, task, processing)
    cut = data.truncate or ("split" if name == "text" else "end")
    all_tokens = name == "text" or data.loss_on == "all"
    encoder = Encoder(data, task, processing, None, max_length or 0, cut, all_tokens, template)
    told = "the tokenizer's" if template else None
    if template and template.tokenizer.chat_template == PLAIN:
        told = "none of the tokenizer's; plain headings"
    elif template and data.chat_template:
        told = data.chat_template
    report = Report(name, task, told, max_length)
    other = _other(data)
    mark = source.fingerprint(data.streaming) + (other.fingerprint(data.streaming) if other else "")
    job = Job(data, name, source, other, encoder, seed, report)
    made = stream(job) if data.streaming else whole(job, folder)
    report.notes += [*(template.notes if template else ())]
    batches = collator(job.encoder.task, processing, data.packing, "flash" in attention)
    return Prepared(*made, batches, job.encoder.task, job.encoder.labels, data.packing, mark, report)


def _source(data: Data) -> Source:
    return sources.find(data.paths, data.name, data.split, data.streaming)


def _other(data: Data) -> Source | None:
    """The held-out rows of their own file."""
    return sources.find([data.held_out], None, None, data.streaming) if isinstance(data.held_out, str) else None


def _format(data: Data, source: Source) -> tuple[str, Row]:
    first = next(iter(source), None)
    if first is None:
        raise DataError(f"{listed(data.paths)} has no rows.")
    formats.check_columns(data.format, data.columns)
    name = formats.recognized(first, data.columns) if data.format == "auto" else data.format
    formats.check_columns(name, data.columns)
    return name, first


def collator(
    task: str, processing: Any, packing: bool = False, flat: bool = False
) -> Callable[[Sequence[Columns]], dict[str, Any]]:
    """What makes batches of a task's rows; `flat` joins packed rows into one."""
    if task == "image_classification":
        return collate.Pictures(processing)
    if task == "speech":
        return collate.Recordings(processing.feature_extractor)
    padding = padding_id(tokenizer_of(processing))
    if task == "preference":
        return collate.Preferences(padding)
    return collate.Packed(padding, flat) if packing else collate.Tokens(padding)
