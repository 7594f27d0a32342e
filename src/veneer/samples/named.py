"""Samples by the names that recipes call them: models as folders, rows as files, made on first use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from veneer.errors import MissingSample, closest
from veneer.samples import (
    digits,
    dinov2,
    flan_t5,
    minilm,
    phone_prompts,
    sentiment,
    smollm2,
    verses,
    whisper,
    whole,
    word_problems,
)

PREFIX = "sample:"
SYSTEM = "Rewrite in modern English."
WORDS = 20
"""The longest King James verse among the rows: a third of all are as short, and a minute goes further on them."""


def located(name: str) -> str:
    """The path behind `sample:...`, or the text itself where it is something else; MissingSample for an unknown one."""
    if not name.startswith(PREFIX):
        return name
    if name not in _SAMPLES:
        near = closest(name, _SAMPLES) or f" There are: {', '.join(_SAMPLES)}."
        raise MissingSample(f"{name} is no sample of Veneer's.{near}")
    return str(_SAMPLES[name]())


def _rows(file: str, make: Callable[[], Iterable[dict[str, Any]]]) -> Callable[[], Path]:
    def path() -> Path:
        def fill(folder: Path) -> None:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make())
            (folder / file).write_text(text, encoding="utf-8")

        return whole.cached(f"rows-2-{file.removesuffix('.jsonl')}", fill) / file

    return path


def _reviews() -> Iterable[dict[str, Any]]:
    sentences, _ = sentiment.load(0)
    return ({"text": one.text, "label": "positive" if one.positive else "negative"} for one in sentences)


def _verses(held_out: bool) -> Iterable[dict[str, Any]]:
    split = verses.split(0)
    for verse in split.held_out if held_out else split.train:
        if len(verse.source.split()) <= WORDS:
            yield _conversation(("system", SYSTEM), ("user", verse.source), ("assistant", verse.target))


def _problems(held_out: bool) -> Iterable[dict[str, Any]]:
    for problem in word_problems.split()[held_out]:
        yield _conversation(("user", problem.question), ("assistant", problem.worked))


def _conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _pairs(held_out: bool) -> Iterable[dict[str, Any]]:
    return (
        {"source": f"{SYSTEM.removesuffix('.')}: {question['content']}", "target": answer["content"]}
        for _, question, answer in (row["messages"] for row in _verses(held_out))
    )


_SAMPLES: dict[str, Callable[[], Path]] = {
    "sample:smollm2": smollm2.folder,
    "sample:minilm": minilm.folder,
    "sample:dinov2": dinov2.folder,
    "sample:digits": digits.folder,
    "sample:film-reviews": _rows("film-reviews.jsonl", _reviews),
    "sample:verses": _rows("verses.jsonl", lambda: _verses(held_out=False)),
    "sample:verses-held-out": _rows("verses-held-out.jsonl", lambda: _verses(held_out=True)),
    "sample:word-problems": _rows("word-problems.jsonl", lambda: _problems(held_out=False)),
    "sample:word-problems-held-out": _rows("word-problems-held-out.jsonl", lambda: _problems(held_out=True)),
    "sample:flan-t5": flan_t5.folder,
    "sample:verse-pairs": _rows("verse-pairs.jsonl", lambda: _pairs(held_out=False)),
    "sample:verse-pairs-held-out": _rows("verse-pairs-held-out.jsonl", lambda: _pairs(held_out=True)),
    "sample:whisper": whisper.folder,
    "sample:phone-prompts": lambda: phone_prompts.folder() / "train.jsonl",
    "sample:phone-prompts-held-out": lambda: phone_prompts.folder() / "held-out.jsonl",
}
