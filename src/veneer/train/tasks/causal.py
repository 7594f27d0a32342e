"""Causal language models: conversations, completions and plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.errors import RecipeError
from veneer.train.evaluate import write
from veneer.train.labels import IGNORED
from veneer.train.metrics import WRITTEN
from veneer.train.tasks.task import Answered, Collate, Scored, Task, decoded, perplexity


def _scored(model: Any, batch: dict[str, Any]) -> Scored:
    return Scored(float(model(**batch).loss), int((batch["labels"][:, 1:] != IGNORED).sum()))


def _ask(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], collate: Collate, longest: int) -> Answered:
    prompts = []
    for row in rows:
        first = next(n for n, label in enumerate(row["labels"]) if label != IGNORED)
        if first == 0:
            raise RecipeError(
                f"evaluation.metrics need questions before the answers. Leave out {', '.join(sorted(WRITTEN))}."
            )
        prompts.append(row["input_ids"][:first])
    answers = write(model, tokenizer, prompts, max_new_tokens=longest)
    return Answered([tokenizer.decode(prompt) for prompt in prompts], answers, decoded(tokenizer, rows))


CAUSAL = Task(
    "causal",
    AutoModelForCausalLM,
    AutoTokenizer,
    metrics=("perplexity", *sorted(WRITTEN)),
    usual=("perplexity",),
    scored=_scored,
    figures=perplexity,
    ask=_ask,
)
