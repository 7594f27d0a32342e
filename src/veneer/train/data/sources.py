"""Rows of files, folders and ids, one at a time, each with the place that an error names: file and line."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from veneer.errors import DataError, closest, listed
from veneer.samples import named
from veneer.train.data.extras import extra

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
DOCUMENTS = (".txt", ".md")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
PROBE = 1 << 20
"""Bytes at the start and at the end of each file that stand for a stream's content."""


class Row(NamedTuple):
    """One row as it stands in the source. `folder` is where its relative paths start."""

    where: str
    fields: dict[str, Any]
    folder: str


@dataclass(frozen=True)
class Source:
    """Local files, or one id of the `datasets` library. Reading starts anew with each iteration."""

    files: tuple[str, ...] = ()
    classes: str = ""
    """The folder of images in one folder a class, where that is what `files` are."""
    identifier: str = ""
    name: str | None = None
    split: str = "train"
    streaming: bool = False

    def __iter__(self) -> Iterator[Row]:
        return self.rows(self.files)

    def rows(self, files: Sequence[str]) -> Iterator[Row]:
        """The rows of some of the files, in order; of an id, all."""
        if self.identifier:
            yield from self._identified()
        for file in files:
            if self.classes:
                label = Path(file).relative_to(self.classes).parts[0]
                yield Row(file, {"image": file, "label": label}, self.classes)
            else:
                yield from _read(Path(file))

    def _identified(self) -> Iterator[Row]:
        for number, fields in enumerate(self._load(), start=1):
            yield Row(f"{self.identifier}, {self.split} row {number}", dict(fields), "")

    def _load(self) -> Any:
        datasets = extra("datasets")

        try:
            found = datasets.load_dataset(self.identifier, self.name, split=self.split, streaming=self.streaming)
        except Exception as wrong:  # the library raises many kinds: no network, no such id, no such split
            raise DataError(
                f"{self.identifier!r} is no file here, and the datasets library cannot load it: "
                f"{_short(wrong).rstrip('.')}. Check the path, the name and the split."
            ) from wrong
        for column, kind in (found.features or {}).items():
            if isinstance(kind, datasets.Image | datasets.Audio):
                found = found.cast_column(column, type(kind)(decode=False))
        return found

    def fingerprint(self, streaming: bool = False) -> str:
        """SHA-256 of names and contents; of a stream, of each file's name, size, first and last MiB."""
        found = hashlib.sha256()
        if self.identifier:
            data = self._load()
            marks = [self.identifier, self.name, self.split, getattr(data, "_fingerprint", None)]
            found.update(repr(marks).encode())
        for file in self.files:
            path = Path(file)
            found.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as content:
                if streaming and path.stat().st_size > 2 * PROBE:
                    found.update(content.read(PROBE))
                    content.seek(-PROBE, 2)
                    found.update(content.read(PROBE))
                else:
                    while block := content.read(PROBE):
                        found.update(block)
        return found.hexdigest()


def find(paths: Sequence[str], name: str | None, split: str | None, streaming: bool) -> Source:
    """Where the rows are. DataError for a path that is none, with the nearest names beside it."""
    paths = [named.located(path) for path in paths]
    here = [Path(path).expanduser() for path in paths]
    if not any(path.exists() for path in here):
        if len(here) == 1 and _may_be_id(paths[0]):
            return Source(identifier=paths[0], name=name, split=split or "train", streaming=streaming)
    elif name or split:
        raise DataError(f"data.name and data.split choose a part of an id, but {listed(paths)} is on this machine.")
    missing = [path for path in here if not path.exists()]
    if missing:
        raise DataError("\n".join(_missing(path) for path in missing))
    files: list[Path] = []
    for path in here:
        inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        wanted = [file for file in inside if file.suffix.lower() in TABLES]
        wanted = wanted or [file for file in inside if file.suffix.lower() in DOCUMENTS]
        images = [file for file in inside if file.suffix.lower() in IMAGES and file.parent != path]
        if path.is_dir() and not wanted and images and len(here) == 1:
            return Source(tuple(str(file) for file in images), classes=str(path), streaming=streaming)
        if not wanted:
            raise DataError(
                f"{path} has no file to train on. Rows are read from "
                f"{', '.join(TABLES + DOCUMENTS)}, or from images in one folder a class."
            )
        files += wanted
    return Source(tuple(str(file) for file in files), streaming=streaming)


def _may_be_id(path: str) -> bool:
    if "/" in path and Path(path).parent.is_dir():  # the folder is here, so a file in it was meant
        return False
    local = path.startswith((".", "/", "~")) or path.lower().endswith(TABLES + DOCUMENTS)
    return path.count("/") <= 1 and not local


def _missing(path: Path) -> str:
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"{path} does not exist.{closest(path.name, beside)}"


def _read(file: Path) -> Iterator[Row]:
    reader = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".csv": _separated,
        ".tsv": _separated,
        ".parquet": _parquet,
    }
    try:
        for where, fields in reader.get(file.suffix.lower(), _document)(file):
            if not isinstance(fields, dict):
                raise DataError(f"{where}: a row is an object with named fields, not {_short(fields)}.")
            yield Row(where, fields, str(file.parent))
    except UnicodeDecodeError as wrong:
        raise DataError(f"{file} is not UTF-8: byte {wrong.start} cannot be read. Save it as UTF-8.") from wrong


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    wrong: list[str] = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    fields = json.loads(line)
                except json.JSONDecodeError as error:
                    wrong.append(f"{file}, line {number}: not JSON: {error.msg} at column {error.colno}.")
                    if len(wrong) == MOST:
                        break
                    continue
                if not wrong:
                    yield f"{file}, line {number}", fields
    if wrong:
        raise DataError("\n".join(wrong))


MOST = 10
"""Mistakes that are named before the rest is only counted."""


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, as .jsonl
            yield from _json_lines(file)
            return
        raise DataError(f"{file}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}.") from error
    if isinstance(found, dict):
        lists = [
            key for key, value in found.items() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if len(lists) != 1:
            raise DataError(f"{file} holds one object with the fields {listed(found)}; rows are a list of objects.")
        found = found[lists[0]]
    if not isinstance(found, list):
        raise DataError(f"{file} holds {_short(found)}; rows are a list of objects.")
    for number, fields in enumerate(found, start=1):
        yield f"{file}, row {number}", fields


def _separated(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        start = 2
        try:
            for fields in rows:
                where = f"{file}, line {start}"
                start = rows.line_num + 1
                if None in fields or None in fields.values():
                    count = len(rows.fieldnames or ())
                    raise DataError(
                        f"{where}: not {count} columns, as the first line has. Quote fields with separators."
                    )
                yield where, {str(key): value for key, value in fields.items() if value != ""}
        except csv.Error as wrong:
            raise DataError(f"{file}, line {rows.line_num}: {wrong}.") from wrong


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as content:
            number = 0
            for batch in content.iter_batches(1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", fields
    except pyarrow.ArrowInvalid as wrong:
        raise DataError(f"{file} is no Parquet file: {_short(wrong)}") from wrong


def _document(file: Path) -> Iterator[tuple[str, Any]]:
    yield str(file), {"text": file.read_text(encoding="utf-8-sig")}


def _short(value: Any) -> str:
    text = str(value).strip().split("\n")[0]
    return text if len(text) <= 160 else f"{text[:160]}…"
