"""What preparing does with rows, whether they are read once or while they are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from veneer.errors import DataError, TemplateError, listed
from veneer.train.data import formats
from veneer.train.data.encode import Columns, Encoder, tokenizer_of
from veneer.train.data.extras import extra
from veneer.train.data.kinds import Example
from veneer.train.data.packing import pack
from veneer.train.data.problems import Problems
from veneer.train.data.report import Report
from veneer.train.data.schema import Data
from veneer.train.data.sources import Row, Source


@dataclass
class Job:
    """One preparation, whole or as a stream: rows to examples to columns, noted in the report."""

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

    def counted(self, rows: Iterable[Columns]) -> Iterator[Columns]:
        """The rows as they are, noted in the report."""
        for row in rows:
            self.report.count(row)
            yield row

    def packed(self, rows: Iterable[Columns]) -> Iterable[Columns]:
        """Several examples a row, if the recipe says so."""
        return pack(rows, self.encoder.max_length) if self.data.packing else rows

    def features(self) -> Any:
        """The columns of an encoded row, as datasets.Features."""
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

    def tell(self, tally: Any) -> None:
        """What was cut, joined and dropped, for the report."""
        self.report.truncated, self.report.split, self.report.joined = tally.truncated, tally.split, tally.joined
        self.report.dropped = dict(tally.dropped)

    def nothing_learned(self, pairs: Sequence[tuple[str, Example]]) -> NoReturn:
        """DataError: no row is left, and why."""
        why = ", ".join(f"{count:,} {what}" for what, count in self.report.dropped.items()) or "there are no rows"
        rows = listed([where for where, _ in pairs], 3)
        raise DataError(f"Nothing is left to learn from {rows}: {why}. Look at it with: veneer data.")
