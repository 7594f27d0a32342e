"""What pydantic finds wrong with a recipe, in the words of Veneer's errors: line, place, and the nearest valid name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from veneer.errors import closest
from veneer.train import lines


def said(one: Any, found: lines.Lined, whole: type[BaseModel]) -> str:
    """One mistake: line, place, what is wrong, and the nearest valid name."""
    path = tuple(part for part in one["loc"])
    names = [str(part) for part in path if not _branch(str(part))]
    where, line = ".".join(names), found.line(path)
    at = f"{line}: " if line else ""
    if one["type"] == "extra_forbidden":
        known = _known(path[:-1], whole)
        return f"{at}{where} is no option.{closest(names[-1], known) or there(known)}"
    if one["type"] == "missing":
        return f"{at}{where} is missing."
    if one["type"] == "value_error":
        return f"{at}{where}: {one['msg'].removeprefix('Value error, ')}."
    seen = one["input"]
    near = ""
    if one["type"] == "literal_error" and isinstance(seen, str):
        near = closest(seen, re.findall(r"'([^']+)'", one["msg"]))
    message = one["msg"].removeprefix("Input ")
    return f"{at}{where} {message}, not {json.dumps(seen)[:60]}.{near}"


def _branch(part: str) -> bool:
    """Whether a part of an error's place is no name but one of several types that a value may have."""
    return bool(
        re.match(r"(literal|list|tuple|constrained|function|union|float|int|str)\b.*[\[\-]|(float|int|str)$", part)
    )


def _known(path: tuple[str | int, ...], whole: type[BaseModel]) -> list[str]:
    """The options that there are at a place."""
    inner: Any = whole
    for part in path:
        field = inner.model_fields.get(str(part)) if isinstance(inner, type) and issubclass(inner, BaseModel) else None
        inner = None if field is None else field.annotation
        if not isinstance(inner, type):
            inner = next((each for each in getattr(inner, "__args__", ()) if isinstance(each, type)), None)
    return list(inner.model_fields) if isinstance(inner, type) and issubclass(inner, BaseModel) else []


def there(names: Iterable[str]) -> str:
    """All names that there are."""
    return f" There are: {', '.join(sorted(names))}." if names else ""
