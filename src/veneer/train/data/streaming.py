"""Rows that are read while they are trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from veneer.train.data import formats, split
from veneer.train.data.encode import Columns
from veneer.train.data.extras import extra
from veneer.train.data.job import Job
from veneer.train.data.problems import Problems
from veneer.train.data.report import Report
from veneer.train.data.sources import Row

SAMPLE = 1000
"""Rows of a stream that its report is made of."""


def stream(job: Job) -> tuple[Any, Any]:
    """Datasets that read while they are iterated, and a report of the first rows."""
    datasets = extra("datasets")
    data, problems = job.data, Problems()
    told = data.labels
    if told == "numbers":
        job.encoder.task = job.report.task = "regression"
    elif told:
        job.encoder.labels = list(told)
    job.report.sampled = True
    train, held = _Side(job, held=False), _Side(job, held=True)
    head = list(itertools.islice(job.parsed(train.rows(None), problems), SAMPLE))
    for _ in job.counted(job.encoded(head, problems)):
        pass
    problems.raise_any()
    job.tell(job.encoder.tally)
    if not job.report.train:
        job.nothing_learned(head)
    features = job.features()
    whole = (isinstance(data.held_out, int) and data.held_out) or data.limit
    files = job.source.files or ("",)
    made = datasets.IterableDataset.from_generator(
        train, gen_kwargs={"files": files if whole else list(files)}, features=features
    )
    if data.shuffle:
        made = made.shuffle(seed=job.seed, buffer_size=data.shuffle_buffer)
    if not data.held_out:
        return made, None
    held_files = (job.other.files or ("",)) if job.other else files
    kept = datasets.IterableDataset.from_generator(held, gen_kwargs={"files": tuple(held_files)}, features=features)
    return made, kept


@dataclass(frozen=True)
class _Side:
    """One side of a stream; can be sent to another process, and starts anew with each call."""

    job: Job
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

    def _encoded(self, job: Job, files: Sequence[str]) -> Iterator[Columns]:
        for row in self.rows(files):
            problems = Problems()
            yield from job.encoded(job.parsed([row], problems), problems)
            problems.raise_any()
