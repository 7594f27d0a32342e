"""Rows that are read once: held out, freed of duplicates, shuffled, encoded and written to the disk."""

from __future__ import annotations

import atexit
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from veneer.errors import DataError, listed
from veneer.train.data import split
from veneer.train.data.encode import Columns
from veneer.train.data.extras import extra
from veneer.train.data.job import Job
from veneer.train.data.kinds import Example, Labelled, Picture
from veneer.train.data.problems import Problems

DECIMAL = re.compile(r"[-+]?\d*\.\d+(e[-+]?\d+)?", re.IGNORECASE)


def whole(job: Job, folder: Path | None) -> tuple[Any, Any]:
    """Everything, read once; the encoded rows lie on the disk."""
    data, report, problems = job.data, job.report, Problems()
    pairs = list(job.parsed(job.source, problems))
    if data.limit and data.limit < len(pairs):
        chosen = sorted(random.Random(job.seed).sample(range(len(pairs)), data.limit))
        pairs = [pairs[row] for row in chosen]
    held_pairs = list(job.parsed(job.other, problems)) if job.other else []
    problems.raise_any()
    keys = [split.key(example) for _, example in pairs]
    train = list(range(len(pairs)))
    if job.other:
        held_keys = [split.key(example) for _, example in held_pairs]
    else:
        held = split.held_out(keys, count, job.seed) if (count := _count(job, len(pairs))) else set()
        held_pairs, held_keys = [pairs[row] for row in sorted(held)], [keys[row] for row in sorted(held)]
        train = [row for row in train if row not in held]
    report.duplicates = len(split.repeated(keys, range(len(keys))))
    if data.drop_duplicates:
        twice = set(split.repeated(keys, train, held_keys))
        train = [row for row in train if row not in twice]
        if twice:
            job.encoder.tally.dropped["seen before, or held out"] += len(twice)
    report.leakage = split.leaked([keys[row] for row in train], held_keys)
    if data.shuffle:
        random.Random(job.seed).shuffle(train)
    train_pairs = [pairs[row] for row in train]
    _settle_labels(job, [*train_pairs, *held_pairs])
    place = folder or _scratch()
    place.mkdir(parents=True, exist_ok=True)
    rows = job.counted(job.encoded(train_pairs, problems))
    made = _written(job, job.packed(rows), place / "train.arrow")
    report.packed = len(made) if data.packing and made is not None else None
    tally, job.encoder.tally = job.encoder.tally, type(job.encoder.tally)()
    held_rows = job.packed(job.encoded(held_pairs, problems))
    held_made = _written(job, held_rows, place / "held_out.arrow")
    problems.raise_any()
    report.held_out = len(held_pairs) - job.encoder.tally.dropped.total()
    job.tell(tally)
    if made is None:
        job.nothing_learned(train_pairs)
    return made, held_made


def _count(job: Job, rows: int) -> int:
    """How many rows are held out: at least one, and at least one is left to train on."""
    wish = job.data.held_out
    assert not isinstance(wish, str)
    if isinstance(wish, float):
        return min(max(1, round(wish * rows)), rows - 1) if wish else 0
    if wish >= rows:
        raise DataError(f"data.held_out: {wish} leaves nothing to train on of {rows} rows.")
    return wish


def _settle_labels(job: Job, pairs: Sequence[tuple[str, Example]]) -> None:
    """Names of the classes, or numbers to learn; and how often each occurs."""
    found = [example.label for _, example in pairs if isinstance(example, Labelled | Picture)]
    if not found:
        return
    told = job.data.labels
    if told == "numbers" or (told is None and job.format != "image_classification" and _numbers(found)):
        job.encoder.task = job.report.task = "regression"
        return
    seen = Counter(str(label) for label in found)
    names = (
        list(told)
        if told
        else sorted(seen, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    )
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise DataError(f"labels are {listed(names)}: a class needs another one to be told from. Check data.labels.")
    job.encoder.labels = names
    job.report.labels = {name: seen[name] for name in names}


def _numbers(labels: Sequence[str | int | float]) -> bool:
    """Whether labels are numbers to learn: all can be read as such, and one has a decimal point."""
    texts = [str(label) for label in labels]
    decimal = [bool(DECIMAL.fullmatch(text)) for text in texts]
    return any(decimal) and all(
        found or text.lstrip("+-").isdigit() for found, text in zip(decimal, texts, strict=True)
    )


def _written(job: Job, rows: Iterable[Columns], path: Path) -> Any:
    """A dataset on the disk, mapped into memory; None without rows."""
    datasets = extra("datasets")
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=str(path), features=job.features()) as writer:
        count = 0
        for row in rows:
            writer.write(row)
            count += 1
        if not count:
            return None
        writer.finalize()
    return datasets.Dataset.from_file(str(path))


def _scratch() -> Path:
    """A folder until this process ends: what is read from it is mapped into memory, also in other processes."""
    place = Path(tempfile.mkdtemp(prefix="veneer-data-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place
