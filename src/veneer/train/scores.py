"""Answers that a model writes to held-out questions, against their references."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import RecipeError
from veneer.train.encoding import IGNORED
from veneer.train.evaluate import chrf, write
from veneer.train.recipe import Evaluation

SHOWN = 5


@dataclass
class Written:
    """Scores of written answers, and the first few of them."""

    metrics: dict[str, float] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)


def score(model: Any, tokenizer: Any, rows: Any, evaluation: Evaluation, seed: int) -> Written:
    """What the recipe asks for of written answers; nothing where it asks for none."""
    if not evaluation.metrics:
        return Written()
    chosen = list(range(len(rows)))
    if len(chosen) > evaluation.limit:
        chosen = sorted(random.Random(seed).sample(chosen, evaluation.limit))
    prompts, references = [], []
    for row in (rows[number] for number in chosen):
        first = next(n for n, label in enumerate(row["labels"]) if label != IGNORED)
        if first == 0:
            raise RecipeError("evaluation.metrics need questions that come before the answers. Leave metrics out.")
        prompts.append(row["input_ids"][:first])
        answer = [label for label in row["labels"][first:] if label != IGNORED]
        references.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    answers = write(model, tokenizer, prompts, max_new_tokens=evaluation.max_new_tokens)
    scores = {"chrf": chrf, "exact_match": exact_match}
    shown = zip(prompts[:SHOWN], answers, references, strict=False)
    return Written(
        {name: scores[name](answers, references) for name in evaluation.metrics},
        [{"prompt": tokenizer.decode(p), "answer": a, "reference": r} for p, a, r in shown],
    )


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that are the reference, but for space around them."""
    return sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True)) / len(references)
