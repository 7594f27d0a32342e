"""Models by name, `llama:7b`: their published dimensions stand in presets.toml, so that a plan needs no files."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from veneer.errors import PlanError, closest


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("veneer.plan").joinpath("presets.toml").read_text(encoding="utf-8"))


def names() -> list[str]:
    """Every `family:size` there is."""
    return [f"{family}:{size}" for family, entry in _table().items() for size in entry["sizes"]]


def published(name: str) -> int:
    """The number of parameters that was published for a model."""
    family, size = _found(name)
    count: int = _table()[family]["sizes"][size]["parameters"]
    return count


def preset(name: str) -> Any:
    """The transformers config of a model by name, such as `llama:7b` or `qwen3:32b`; PlanError where there is none.

    A family's name alone is its usual size, where it has one: `mistral` is `mistral:7b`, `gpt2` is `gpt2:small`.
    """
    from veneer.seams.transformers import config_with

    family, size = _found(name)
    entry = _table()[family]
    options = entry.get("options", {}) | entry["sizes"][size]
    del options["parameters"]
    return config_with(entry["model_type"], entry["architecture"], {"dtype": entry["dtype"]} | options)


def _found(name: str) -> tuple[str, str]:
    family, _, size = name.lower().partition(":")
    entry = _table().get(family)
    if entry is not None:
        size = size or entry.get("default", "")
        if size in entry["sizes"]:
            return family, size
        has = ", ".join(f"{family}:{each}" for each in entry["sizes"])
        raise PlanError(f"No model '{name}'. Of this family there are: {has}.")
    near = closest(name.lower(), names()) or closest(family, _table())
    raise PlanError(f"No model '{name}'.{near} See veneer.plan.presets.names() for all {len(names())}.")
