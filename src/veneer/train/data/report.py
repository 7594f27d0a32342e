"""What became of the rows: counts, lengths, what was cut, what repeats, what leaked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.text import Text

from veneer.train.labels import IGNORED

BARS = 12
WIDE = 40


@dataclass
class Report:
    """Counts of rows as they were read, and of the examples that were made of them.

    `lengths` are tokens of each training example, before packing; `sampled` says that all counts are of the first
    rows of a stream; `leakage` counts held-out rows that training has as they are ("same"), or with another answer
    ("same_question").
    """

    format: str
    task: str
    template: str | None
    max_length: int | None
    rows: int = 0
    train: int = 0
    held_out: int = 0
    tokens: int = 0
    learned: int = 0
    lengths: list[int] = field(default_factory=list)
    truncated: int = 0
    split: int = 0
    joined: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    leakage: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    packed: int | None = None
    sampled: bool = False
    notes: list[str] = field(default_factory=list)

    def count(self, row: dict[str, Any]) -> None:
        """One more training example."""
        self.train += 1
        if "length" in row:
            self.lengths.append(row["length"])
        if "input_ids" in row and isinstance(row["labels"], list):
            self.tokens += len(row["input_ids"])
            self.learned += sum(label != IGNORED for label in row["labels"])

    def as_dict(self) -> dict[str, Any]:
        """For programs: everything, the lengths by their quantiles and a histogram [from, below, count]."""
        found = asdict(self)
        found["lengths"] = quantiles(self.lengths)
        found["histogram"] = [list(one) for one in histogram(self.lengths)]
        return found

    def lines(self) -> Iterator[str]:
        """For people."""
        of = " of the rows read so far" if self.sampled else ""
        sides = f"{self.train:,} to train on, {self.held_out:,} held out"
        yield f"{self.format} for {self.task}: {self.rows:,} rows{of}, {sides}"
        if self.template:
            yield f"chat template: {self.template}"
        if self.tokens:
            yield f"{self.tokens:,} tokens, {self.learned:,} of them learned ({self.learned / self.tokens:.0%})"
        if self.packed:
            fill = self.tokens / (self.packed * (self.max_length or 1))
            yield f"packed into {self.packed:,} rows of {self.max_length:,} tokens, {fill:.0%} full"
        if self.labels:
            yield "labels: " + ", ".join(f"{name} {count:,}" for name, count in self.labels.items())
        for count, what in (
            (self.truncated, f"longer than {self.max_length} tokens and cut"),
            (self.split, "conversations made into several examples, because the template rewrites earlier turns"),
            (self.joined, "tokens lay across the edge of an answer; both sides were tokenized alone"),
            (self.duplicates, "rows that repeat another"),
            (self.leakage.get("same", 0), "held-out rows that are also trained on"),
            (
                self.leakage.get("same_question", 0),
                "held-out rows whose question is also trained on, with another answer",
            ),
        ):
            if count:
                yield f"{count:,} {what}"
        for why, count in self.dropped.items():
            yield f"{count:,} dropped: {why}"
        yield from self.notes
        if self.lengths:
            yield ""
            yield "tokens  " + "  ".join(f"{name} {value:,}" for name, value in quantiles(self.lengths).items())
            bars = histogram(self.lengths)
            most = max(count for *_, count in bars)
            for start, stop, count in bars:
                yield f"{start:>6}-{stop - 1:<6} {'█' * -(-count * WIDE // most)} {count:,}"


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Of the lengths: least, median, 90th and 99th percentile, most."""
    if not lengths:
        return {}
    ranked = sorted(lengths)
    shares = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: ranked[round(share * (len(ranked) - 1))] for name, share in shares.items()}


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(from, below, how many) in at most BARS steps of equal width."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    step = max(1, -(-(high + 1 - low) // BARS))
    edges = range(low, high + 1, step)
    counts = [0] * len(edges)
    for length in lengths:
        counts[(length - low) // step] += 1
    return [(edge, edge + step, count) for edge, count in zip(edges, counts, strict=True)]


def shown(row: dict[str, Any], task: str, tokenizer: Any, names: Sequence[str] | None) -> Text:
    """One example for people: what is only read is dim, what is learned is not. Images need no tokenizer."""
    text = Text()
    if task == "preference":
        text.append(tokenizer.decode(row["prompt_ids"]), "dim")
        for name in ("chosen", "rejected"):
            text.append(f"\n{name}: ", "bold").append(tokenizer.decode(row[f"{name}_ids"]))
    elif task == "causal":
        ids, labels = row["input_ids"], row["labels"]
        for start, stop in runs(labels):
            text.append(tokenizer.decode(ids[start:stop]), "dim" if labels[start] == IGNORED else "")
    else:
        media = row.get("image") or row.get("audio")
        text.append((media["path"] or "bytes") if media else tokenizer.decode(row["input_ids"]), "dim")
        label = row["labels"]
        if isinstance(label, list):
            text.append("\ntarget: ", "bold").append(tokenizer.decode(label))
        else:
            text.append("\nlabel: ", "bold").append(names[label] if names else f"{label:g}")
    return text


def runs(labels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of what is learned and what is not, in turn."""
    start = 0
    for place in range(1, len(labels) + 1):
        if place == len(labels) or (labels[place] == IGNORED) != (labels[start] == IGNORED):
            yield start, place
            start = place
