"""One field of a row as the type that its format wants, or `Wrong` in words that follow the row's place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.errors import closest


class Wrong(Exception):
    """What a row lacks, in words that follow its place."""


def text_of(fields: Mapping[str, Any], name: str) -> str:
    """A field of text; empty where it is missing."""
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Wrong(f"field '{name}' is {kind_of(value)}, not text")
    return value


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    kinds = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def label_of(fields: Mapping[str, Any]) -> str | int | float:
    """The field `label`: the name of a class, or a number."""
    value = fields["label"]
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, str | int | float):
        raise Wrong(f"field 'label' is {kind_of(value)}, not a name or a number")
    return value


def media_of(fields: Mapping[str, Any], name: str, folder: str) -> dict[str, Any]:
    """A file by its path, from the folder of the row's own file, or its bytes."""
    value = fields[name]
    if isinstance(value, dict) and value.get("bytes"):
        return {"path": None, "bytes": value["bytes"]}
    value = value.get("path") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise Wrong(f"field '{name}' is {kind_of(value)}, not the path of a file")
    path = Path(folder, value)  # an absolute path stays one
    if not path.is_file():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise Wrong(f"field '{name}' names {value}, which is no file below {folder}.{closest(path.name, beside)}")
    return {"path": str(path), "bytes": None}


def parsed(value: Any) -> Any:
    """JSON that stands in a row as text, as in tables that have no columns of objects."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
