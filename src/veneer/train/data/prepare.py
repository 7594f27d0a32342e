"""From the `data` section of a recipe to what a Trainer takes: rows, a collator, a report of what became of them."""

from __future__ import annotations

import atexit
import itertools
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, ProcessorMixin

from veneer.errors import DataError, TemplateError, listed
from veneer.train.batch import padding_id
from veneer.train.data import collate, formats, sources, split
from veneer.train.data.chat import PLAIN, Template
from veneer.train.data.encode import CUTS, LONGEST, Columns, Encoder, tokenizer_of
from veneer.train.data.extras import extra
from veneer.train.data.formats import Chat, Example, Labelled, Picture, Preference
from veneer.train.data.packing import pack
from veneer.train.data.report import Report
from veneer.train.data.schema import Data
from veneer.train.data.sources import Row, Source

SAMPLE = 1000
"""Rows of a stream that its report is made of."""
CHATS = ("alpaca", "sharegpt", "messages", "prompt_completion", "preference")
DECIMAL = re.compile(r"[-+]?\d*\.\d+(e[-+]?\d+)?", re.IGNORECASE)


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


class Problems:
    """What is wrong with rows, collected so that all is said at once; alike ones are said once."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, where: str, what: str) -> None:
        """One more; DataError when there are too many to go on."""
        self.found.setdefault(what, []).append(where)
        if len(self.found) >= sources.MOST:
            self.raise_any("Reading stopped here.")

    def raise_any(self, last: str = "") -> None:
        """DataError if there are any."""
        if self.found:
            lines = [
                f"{rows[0]}{f' and {len(rows) - 1:,} other rows' if len(rows) > 1 else ''}: {what}"
                for what, rows in self.found.items()
            ]
            raise DataError("\n".join([*lines, last] if last else lines))


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
    _check_options(data, name)
    seed = data.seed if data.seed is not None else seed
    task = formats.FORMATS[name].task
    _check_processing(task, processing)
    template = _template(data, name, processing, first)
    max_length = _max_length(data, task, processing)
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
    job = _Job(data, name, source, other, encoder, seed, report)
    made = job.stream() if data.streaming else job.whole(folder)
    report.notes += [*(template.notes if template else ())]
    batches = _collator(job.encoder.task, processing, data.packing, "flash" in attention)
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


def _check_options(data: Data, name: str) -> None:
    """DataError for all options that would change nothing for this format."""
    task = formats.FORMATS[name].task
    wrong = []
    for options, serve, who in (
        (("packing", "loss_on"), task == "causal", "causal language models"),
        (("system", "chat_template"), name in CHATS, "conversations"),
        (("labels",), task in ("sequence_classification", "image_classification"), "classes and numbers"),
        (("max_length", "truncate"), task != "image_classification", "tokens"),
    ):
        wrong += [
            f"data.{option} is for {who} and changes nothing for the format {name}. Leave it out."
            for option in options
            if data.told(option) and not serve
        ]
    if name == "text" and data.loss_on == "answers":
        wrong.append("data.loss_on: answers needs answers, which the format text does not have. Leave it out.")
    cuts = CUTS.get(task, ()) + (("split",) if name == "text" else ())
    if data.truncate and cuts and data.truncate not in cuts:
        wrong.append(f"data.truncate: {data.truncate} is not for the format {name}; choose {', '.join(cuts)}.")
    if data.labels == "numbers" and task == "image_classification":
        wrong.append("data.labels: numbers is for texts; images have classes.")
    if data.streaming and task in ("sequence_classification", "image_classification") and not data.labels:
        wrong.append("data.labels has to name the classes of a stream, which is not read before training.")
    if wrong:
        raise DataError("\n".join(wrong))


def _check_processing(task: str, processing: Any) -> None:
    """DataError for what cannot make a batch of these rows."""
    if task == "image_classification":
        if not isinstance(processing, BaseImageProcessor):
            raise DataError(f"Images need an image processor, not {type(processing).__name__}.")
    elif task == "speech" and not isinstance(processing, ProcessorMixin):
        raise DataError(
            f"Speech needs a processor with feature extractor and tokenizer, not {type(processing).__name__}."
        )
    else:
        tokenizer_of(processing)


def _template(data: Data, name: str, processing: Any, first: Row) -> Template | None:
    """The template of conversations, put onto the tokenizer where it has none or the recipe names one."""
    example = formats.parse(first, name, data.columns)
    chats = isinstance(example, Chat) or (isinstance(example, Preference) and not isinstance(example.chosen, str))
    if not chats:
        idle = [option for option in ("system", "chat_template") if data.told(option)]
        if idle and name in CHATS:
            raise DataError(f"data.{' and data.'.join(idle)} is for messages; the rows of {first.where} are texts.")
        return None
    tokenizer = tokenizer_of(processing)
    if data.chat_template:
        path = Path(data.chat_template)
        if not path.is_file():
            raise DataError(f"data.chat_template names {path}, which does not exist.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN
    return Template(tokenizer)


def _max_length(data: Data, task: str, processing: Any) -> int | None:
    if task == "image_classification":
        return None
    most = tokenizer_of(processing).model_max_length
    if data.max_length and data.max_length > most:
        raise DataError(
            f"data.max_length is {data.max_length}, but the tokenizer says that its model takes {most} tokens. Lower "
            "it, or set tokenizer.model_max_length where the model takes more."
        )
    return data.max_length or min(LONGEST, most)


@dataclass
class _Job:
    """One preparation: whole, or as a stream."""

    data: Data
    format: str
    source: Source
    other: Source | None
    encoder: Encoder
    seed: int
    report: Report

    def parsed(self, rows: Iterable[Row], problems: Problems) -> Iterator[tuple[str, Example]]:
        """(where, example) of the rows that hold one."""
        for row in rows:
            self.report.rows += 1
            found = formats.parse(row, self.format, self.data.columns)
            if isinstance(found, str):
                problems.add(row.where, found)
            else:
                yield row.where, found

    def encoded(self, pairs: Iterable[tuple[str, Example]], problems: Problems) -> Iterator[Columns]:
        """The columns of all examples."""
        for where, example in pairs:
            try:
                yield from self.encoder(example)
            except (DataError, TemplateError) as wrong:
                problems.add(where, str(wrong))

    def whole(self, folder: Path | None) -> tuple[Any, Any]:
        """Everything, read once; the encoded rows lie on the disk."""
        data, report, problems = self.data, self.report, Problems()
        pairs = list(self.parsed(self.source, problems))
        if data.limit and data.limit < len(pairs):
            chosen = sorted(random.Random(self.seed).sample(range(len(pairs)), data.limit))
            pairs = [pairs[row] for row in chosen]
        held_pairs = list(self.parsed(self.other, problems)) if self.other else []
        problems.raise_any()
        keys = [split.key(example) for _, example in pairs]
        train = list(range(len(pairs)))
        if self.other:
            held_keys = [split.key(example) for _, example in held_pairs]
        else:
            held = split.held_out(keys, count, self.seed) if (count := self._count(len(pairs))) else set()
            held_pairs, held_keys = [pairs[row] for row in sorted(held)], [keys[row] for row in sorted(held)]
            train = [row for row in train if row not in held]
        report.duplicates = len(split.repeated(keys, range(len(keys))))
        if data.drop_duplicates:
            twice = set(split.repeated(keys, train, held_keys))
            train = [row for row in train if row not in twice]
            if twice:
                self.encoder.tally.dropped["seen before, or held out"] += len(twice)
        report.leakage = split.leaked([keys[row] for row in train], held_keys)
        if data.shuffle:
            random.Random(self.seed).shuffle(train)
        train_pairs = [pairs[row] for row in train]
        self._settle_labels([*train_pairs, *held_pairs])
        place = folder or _scratch()
        place.mkdir(parents=True, exist_ok=True)
        rows = self.counted(self.encoded(train_pairs, problems))
        made = self._written(self.packed(rows), place / "train.arrow", train=True)
        report.packed = len(made) if data.packing and made is not None else None
        tally, self.encoder.tally = self.encoder.tally, type(self.encoder.tally)()
        held_rows = self.packed(self.encoded(held_pairs, problems))
        held_made = self._written(held_rows, place / "held_out.arrow", train=False)
        problems.raise_any()
        report.held_out = len(held_pairs) - self.encoder.tally.dropped.total()
        self._tell(tally)
        if made is None:
            self._nothing_learned(train_pairs)
        return made, held_made

    def counted(self, rows: Iterable[Columns]) -> Iterator[Columns]:
        """The rows as they are, noted in the report."""
        for row in rows:
            self.report.count(row)
            yield row

    def packed(self, rows: Iterable[Columns]) -> Iterable[Columns]:
        """Several examples a row, if the recipe says so."""
        return pack(rows, self.encoder.max_length) if self.data.packing else rows

    def _count(self, rows: int) -> int:
        """How many rows are held out: at least one, and at least one is left to train on."""
        wish = self.data.held_out
        assert not isinstance(wish, str)
        if isinstance(wish, float):
            return min(max(1, round(wish * rows)), rows - 1) if wish else 0
        if wish >= rows:
            raise DataError(f"data.held_out: {wish} leaves nothing to train on of {rows} rows.")
        return wish

    def _settle_labels(self, pairs: Sequence[tuple[str, Example]]) -> None:
        """Names of the classes, or numbers to learn; and how often each occurs."""
        found = [example.label for _, example in pairs if isinstance(example, Labelled | Picture)]
        if not found:
            return
        told = self.data.labels
        if told == "numbers" or (told is None and self.format != "image_classification" and _numbers(found)):
            self.encoder.task = self.report.task = "regression"
            return
        seen = Counter(str(label) for label in found)
        names = (
            list(told)
            if told
            else sorted(seen, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
        )
        if len(set(names)) < 2 or len(set(names)) < len(names):
            raise DataError(
                f"labels are {listed(names)}: a class needs another one to be told from. Check data.labels."
            )
        self.encoder.labels = names
        self.report.labels = {name: seen[name] for name in names}

    def _written(self, rows: Iterable[Columns], path: Path, train: bool) -> Any:
        """A dataset on the disk, mapped into memory; None without rows."""
        datasets = extra("datasets")
        from datasets.arrow_writer import ArrowWriter

        with ArrowWriter(path=str(path), features=self._features()) as writer:
            count = 0
            for row in rows:
                writer.write(row)
                count += 1
            if not count:
                return None
            writer.finalize()
        return datasets.Dataset.from_file(str(path))

    def _features(self) -> Any:
        datasets = extra("datasets")
        number, several = datasets.Value("int32"), datasets.List(datasets.Value("int32"))
        file = {"path": datasets.Value("string"), "bytes": datasets.Value("binary")}
        label = datasets.Value("float32" if self.encoder.task == "regression" else "int64")
        columns: dict[str, dict[str, Any]] = {
            "causal": {"input_ids": several, "labels": several}
            | ({"position_ids": several} if self.data.packing else {}),
            "sequence_classification": {"input_ids": several, "labels": label},
            "regression": {"input_ids": several, "labels": label},
            "seq2seq": {"input_ids": several, "labels": several},
            "preference": {"prompt_ids": several, "chosen_ids": several, "rejected_ids": several},
            "image_classification": {"image": file, "labels": label},
            "speech": {"audio": file, "labels": several},
        }
        found = columns[self.encoder.task]
        classes = self.encoder.task in ("sequence_classification", "regression")
        if classes and "token_type_ids" in tokenizer_of(self.encoder.processing)(""):
            found = found | {"token_type_ids": several}
        if self.encoder.task != "image_classification":
            found = found | {"length": number}
        return datasets.Features(found)

    def _tell(self, tally: Any) -> None:
        self.report.truncated, self.report.split, self.report.joined = tally.truncated, tally.split, tally.joined
        self.report.dropped = dict(tally.dropped)

    def _nothing_learned(self, pairs: Sequence[tuple[str, Example]]) -> None:
        why = ", ".join(f"{count:,} {what}" for what, count in self.report.dropped.items()) or "there are no rows"
        rows = listed([where for where, _ in pairs], 3)
        raise DataError(f"Nothing is left to learn from {rows}: {why}. Look at it with: veneer data.")

    # --- as a stream

    def stream(self) -> tuple[Any, Any]:
        """Datasets that read while they are iterated, and a report of the first rows."""
        datasets = extra("datasets")
        data, problems = self.data, Problems()
        told = data.labels
        if told == "numbers":
            self.encoder.task = self.report.task = "regression"
        elif told:
            self.encoder.labels = list(told)
        self.report.sampled = True
        train, held = _Stream(self, held=False), _Stream(self, held=True)
        head = list(itertools.islice(self.parsed(train.rows(None), problems), SAMPLE))
        for _ in self.counted(self.encoded(head, problems)):
            pass
        problems.raise_any()
        self._tell(self.encoder.tally)
        if not self.report.train:
            self._nothing_learned(head)
        features = self._features()
        whole = (isinstance(data.held_out, int) and data.held_out) or data.limit
        files = self.source.files or ("",)
        made = datasets.IterableDataset.from_generator(
            train, gen_kwargs={"files": files if whole else list(files)}, features=features
        )
        if data.shuffle:
            made = made.shuffle(seed=self.seed, buffer_size=data.shuffle_buffer)
        if not data.held_out:
            return made, None
        held_files = (self.other.files or ("",)) if self.other else files
        kept = datasets.IterableDataset.from_generator(held, gen_kwargs={"files": tuple(held_files)}, features=features)
        return made, kept


@dataclass(frozen=True)
class _Stream:
    """One side of a stream; can be sent to another process, and starts anew with each call."""

    job: _Job
    held: bool

    def rows(self, files: Sequence[str] | None) -> Iterator[Row]:
        """The rows of this side."""
        job, data = self.job, self.job.data
        source = job.other if self.held and job.other else job.source
        rows = source.rows(source.files if files is None else [file for file in files if file])
        wish = data.held_out
        for number, row in enumerate(rows):
            if data.limit and number >= data.limit:
                return
            if isinstance(wish, int):
                if (number < wish) == self.held:
                    yield row
                elif self.held:
                    return
            elif isinstance(wish, float) and wish:
                found = formats.parse(row, job.format, data.columns)
                if isinstance(found, str) or split.in_fraction(split.key(found), wish, job.seed) == self.held:
                    yield row
            else:
                yield row

    def __call__(self, files: Sequence[str]) -> Iterator[Columns]:
        """The encoded rows; DataError at the first one that is wrong."""
        job = replace(self.job, report=Report("", "", None, None))
        yield from job.packed(self._encoded(job, files))

    def _encoded(self, job: _Job, files: Sequence[str]) -> Iterator[Columns]:
        for row in self.rows(files):
            problems = Problems()
            yield from job.encoded(job.parsed([row], problems), problems)
            problems.raise_any()


def _scratch() -> Path:
    """A folder until this process ends: what is read from it is mapped into memory, also in other processes."""
    place = Path(tempfile.mkdtemp(prefix="veneer-data-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _numbers(labels: Sequence[str | int | float]) -> bool:
    """Whether labels are numbers to learn: all can be read as such, and one has a decimal point."""
    texts = [str(label) for label in labels]
    decimal = [bool(DECIMAL.fullmatch(text)) for text in texts]
    return any(decimal) and all(
        found or text.lstrip("+-").isdigit() for found, text in zip(decimal, texts, strict=True)
    )


def _collator(task: str, processing: Any, packing: bool, flat: bool) -> Callable[[Sequence[Columns]], dict[str, Any]]:
    if task == "image_classification":
        return collate.Pictures(processing)
    if task == "speech":
        return collate.Recordings(processing.feature_extractor)
    padding = padding_id(tokenizer_of(processing))
    if task == "preference":
        return collate.Preferences(padding)
    return collate.Packed(padding, flat) if packing else collate.Tokens(padding)
