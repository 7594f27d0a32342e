"""Word problems for primary school with worked answers, from templates with other names and numbers each (Apache-2.0).

The templates are those of Mirzadeh et al., "GSM-Symbolic: Understanding the Limitations of Mathematical Reasoning in
Large Language Models", 2024, as reasoning-gym has them. An answer works the problem out and ends in "#### 24", as
those of GSM8K do. Held-out problems are of the same 85 kinds, and none is also among those to learn from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from veneer.samples import packages

PACKAGE = "reasoning_gym"
TEMPLATES = "arithmetic.gsm_symbolic.gsm_symbolic"
FAR = 1_000_000
"""Problem n of a seed is made by the random number generator of seed + n, so other problems start far from there."""


@dataclass(frozen=True)
class Problem:
    """A question, its worked answer, and the number that is right."""

    question: str
    worked: str
    number: str


def split(train: int = 2000, held_out: int = 200, seed: int = 1) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems, at most so many: one that occurs twice is in one of them, and once."""
    held = {problem.question: problem for problem in _made(held_out, seed + FAR)}
    rest = {problem.question: problem for problem in _made(train, seed) if problem.question not in held}
    return list(rest.values()), list(held.values())


def _made(count: int, seed: int) -> Iterator[Problem]:
    with packages.bare(PACKAGE, "arithmetic"):
        packages.module(PACKAGE, "coaching")  # the first of a circle of imports
        templates = packages.module(PACKAGE, TEMPLATES)
        for row in templates.GSMSymbolicDataset(templates.GSMSymbolicDatasetConfig(size=count, seed=seed)):
            steps, mark, _ = row["metadata"]["answer_cot"].rpartition("#### ")
            yield Problem(row["question"], steps + mark + row["answer"], row["answer"])
