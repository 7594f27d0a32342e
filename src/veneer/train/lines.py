"""YAML as plain data that remembers on which line each thing stands.

The data are those of JSON: `1e-4` is a number, `on` and `2026-11-24` are text. YAML 1.1 would read a text, a boolean
and a date, and each has cost someone a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from veneer.errors import RecipeError

Path = tuple[str | int, ...]
_SCALARS = (
    ("null", re.compile(r"(~|null|Null|NULL|)$")),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$")),
    ("int", re.compile(r"[-+]?[0-9]+$")),
    (
        "float",
        re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    ),
)


class _Loader(yaml.SafeLoader):
    """Scalars by the core schema of YAML 1.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - of this class alone


for _name, _pattern in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, None)


class Lined:
    """Data, and the line of each path in it."""

    def __init__(self, data: Any, lines: dict[Path, str]) -> None:
        self.data = data
        self.lines = lines

    def line(self, path: Path) -> str:
        """Where a path stands, or the nearest thing around it that stands somewhere."""
        return next((found for n in range(len(path), -1, -1) if (found := self.lines.get(path[:n]))), "")

    def put(self, path: Path, value: Any, source: str) -> None:
        """Set what an override says, making the mappings on the way."""
        inner = self.data
        for key in path[:-1]:
            if not isinstance(inner.get(key), dict):
                inner[key] = {}
            inner = inner[key]
        inner[path[-1]] = value
        for each in [each for each in self.lines if each[: len(path)] == path]:
            del self.lines[each]
        self.lines[path] = source


def read(text: str, name: str) -> Lined:
    """The mapping in a text; RecipeError with the line where it is no YAML or names a key twice."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise RecipeError(
            f"{name}{line}: this is no YAML: {error.problem}. Check indents, quotes and colons."
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: this is no YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(root, MappingNode):
        raise RecipeError(f"{name} holds no mapping. A recipe begins with 'model:', 'method:' and 'data:'.")
    lines: dict[Path, str] = {}
    problems: list[str] = []
    data = _plain(root, (), name, lines, problems)
    if problems:
        raise RecipeError("\n".join(problems))
    return Lined(data, lines)


def scalar(text: str) -> Any:
    """What stands behind `=` in an override: a number, a text, a list or a mapping as in YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def _plain(node: Node, path: Path, name: str, lines: dict[Path, str], problems: list[str]) -> Any:
    lines[path] = f"{name}, line {node.start_mark.line + 1}"
    if isinstance(node, SequenceNode):
        return [_plain(each, (*path, n), name, lines, problems) for n, each in enumerate(node.value)]
    if isinstance(node, MappingNode):
        found: dict[str, Any] = {}
        for key, value in _pairs(node):
            if key in found:
                problems.append(f"{name}, line {value.start_mark.line + 1}: {key} stands there twice. Keep one.")
            found[key] = _plain(value, (*path, key), name, lines, problems)
            lines[*path, key] = f"{name}, line {value.key_line}"  # type: ignore[attr-defined]
        return found
    assert isinstance(node, ScalarNode)
    return _Loader("").construct_object(node)


def _pairs(node: MappingNode) -> Iterator[tuple[str, Node]]:
    for key, value in node.value:
        value.key_line = key.start_mark.line + 1
        yield str(key.value), value
