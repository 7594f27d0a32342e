"""What a model makes of each held-out example, so that methods can be compared example by example."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.seams import transformers
from veneer.train.batch import by_length
from veneer.train.data import Prepared
from veneer.train.evaluate import evaluating, on_device
from veneer.train.labels import IGNORED

CLASSES = ("sequence_classification", "image_classification")
LONGEST_TEXT = 300
QUALITY = {"sequence_classification": "accuracy", "regression": "mean_absolute_error"}
"""task -> the figure by which methods are ranked; the loss of a token for the others."""
HIGHER = ("accuracy",)


def examples(model: Any, tokenizer: Any, rows: Any, prepared: Prepared, batch_size: int) -> dict[str, list[Any]]:
    """`values` and `weights` of each row, in their order, and its `texts`, `truths` and `answers` for people.

    Quality is sum(values) / sum(weights): right or wrong over one, |error| over one, or the sum of the negative
    log-likelihoods of a row's learned tokens over their number.
    """
    count = len(rows)
    values, weights, answers = [0.0] * count, [1.0] * count, [""] * count
    with evaluating(model):
        for group in by_length(list(rows["length"]), batch_size):
            batch = on_device(model, prepared.collate([rows[row] for row in group]))
            found = _of_batch(model(**batch).logits.float(), batch["labels"], prepared)
            for row, value, weight, answer in zip(group, *found, strict=True):
                values[row], weights[row], answers[row] = value, weight, answer
    texts, truths = [], []
    for row in rows:
        learned = row["labels"]
        shown = row["input_ids"]
        if prepared.task == "causal":
            shown = [token for token, label in zip(shown, learned, strict=True) if label == IGNORED] or shown
        texts.append(tokenizer.decode(shown, skip_special_tokens=True)[:LONGEST_TEXT])
        truths.append(_truth(tokenizer, learned, prepared)[:LONGEST_TEXT])
    return {"values": values, "weights": weights, "answers": answers, "texts": texts, "truths": truths}


def _of_batch(logits: Tensor, labels: Tensor, prepared: Prepared) -> tuple[list[float], list[float], list[str]]:
    ones = [1.0] * len(labels)
    if prepared.task in CLASSES:
        chosen = logits.argmax(-1)
        names = prepared.labels or []
        return (chosen == labels).float().tolist(), ones, [names[number] for number in chosen.tolist()]
    if prepared.task == "regression":
        numbers = logits.squeeze(-1)
        return (numbers - labels).abs().tolist(), ones, [f"{number:.3g}" for number in numbers.tolist()]
    if prepared.task == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    learned = (labels != IGNORED).sum(1).float()
    return losses.sum(1).tolist(), learned.tolist(), [""] * len(labels)


def _truth(tokenizer: Any, labels: Any, prepared: Prepared) -> str:
    if prepared.labels is not None:
        return prepared.labels[int(labels)]
    if not isinstance(labels, list):
        return f"{float(labels):.3g}"
    text: str = tokenizer.decode([label for label in labels if label != IGNORED], skip_special_tokens=True)
    return text.strip()


def fitting(model: Any, tokens: int) -> int:
    """So many tokens, or half of what the model takes where that is less: methods put some of their own in front."""
    longest = transformers.positions(model.config)
    return tokens if longest is None else min(tokens, longest // 2)


@torch.no_grad()
def embeddings(model: Any, batches: list[dict[str, Any]]) -> Tensor:
    """The mean of the last states over the tokens of each text [texts, width], in float32."""
    found = []
    with evaluating(model):
        for batch in batches:
            batch = on_device(model, batch)
            states = model.base_model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1).float()
            found.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(found).cpu()
