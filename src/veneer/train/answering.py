"""What an adapted model answers to new inputs: a text that it writes, or the class or the number that it finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.train.data.prepare import collator
from veneer.train.evaluate import evaluating, on_device, write
from veneer.train.examples import Example, encode_prompt
from veneer.train.tasks import TASKS

CHATS = ("causal", "preference")
"""The tasks of language models, which answer prompts and hold conversations."""
BATCH = 32
PAIR = "\t"


def prompts(model: Any, tokenizer: Any, asked: Sequence[str], system: str, max_new_tokens: int) -> list[str]:
    """What a language model writes to each prompt, greedily."""
    encoded = [encode_prompt(tokenizer, Example(prompt, "", system)) for prompt in asked]
    return write(model, tokenizer, encoded, max_new_tokens=max_new_tokens)


def inputs(
    name: str, model: Any, processing: Any, labels: Sequence[str] | None, asked: Sequence[str], max_new_tokens: int
) -> list[str]:
    """What another task's model makes of each input: a source text, a text (or two with a tab between), or the path of
    an image or a recording. Texts are written greedily; of classes it is the likeliest one's name."""
    task, collate = TASKS[name], collator(name, processing)
    rows = [_row(name, processing, text) for text in asked]
    if task.ask:
        return task.ask(model, processing, rows, collate, max_new_tokens).answers
    found: list[str] = []
    for start in range(0, len(rows), BATCH):
        with evaluating(model):
            values, _ = task.scored(model, on_device(model, collate(rows[start : start + BATCH]))).outcomes
        found += [labels[value] if labels else f"{value:.6g}" for value in values.tolist()]
    return found


def _row(name: str, processing: Any, text: str) -> dict[str, Any]:
    """An input as a row; what stands for its label is read by nobody."""
    if name == "image_classification":
        return {"image": {"path": text}, "labels": 0}
    if name == "speech":
        return {"audio": {"path": text}, "labels": [0], "length": 0}
    if name == "seq2seq":
        ids = list(processing(text)["input_ids"])
        return {"input_ids": ids, "labels": [0], "length": len(ids)}
    found = processing(*text.split(PAIR, 1))
    columns = {key: list(value) for key, value in found.items() if key in ("input_ids", "token_type_ids")}
    return {**columns, "labels": 0.0 if name == "regression" else 0}
