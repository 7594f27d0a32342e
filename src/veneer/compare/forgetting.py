"""What a model has forgotten: its loss on general text before and after, or how far its sentence embeddings moved."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F

import veneer
from veneer.compare.scoring import embeddings, fitting
from veneer.errors import FileError
from veneer.train.evaluate import evaluating

PASSAGES, LENGTH = 8, 128


def general(file: str | None) -> str:
    """The text of a file, or, without one, Python's own reference manual, which is plain technical English."""
    if file is None:
        return "\n".join(topics[name] for name in sorted(topics))
    try:
        found = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{file} cannot be read as text: {error}.") from None
    if len(found.split()) < PASSAGES:
        raise FileError(f"{file} has {len(found.split())} words, too few to measure forgetting on.")
    return found


def measure(model: Any, tokenizer: Any, task: str, file: str | None) -> dict[str, Any]:
    """`before` and `after`, the adapter aside and in place: the mean loss of a token in PASSAGES passages of LENGTH
    tokens, spread over the text. Where a model predicts no tokens, `drift`: 1 - cosine of the mean of its last states
    before and after, the mean over the passages."""
    if task not in ("causal", "sequence_classification", "regression"):
        return {"skipped": f"no measure of general text is defined for {task}"}
    passages = _passages(tokenizer, general(file), fitting(model, LENGTH))
    if task == "causal":
        with veneer.use(model):
            before = _loss(model, passages)
        return {"before": before, "after": _loss(model, passages)}
    batches = [{"input_ids": passages, "attention_mask": torch.ones_like(passages)}]
    with veneer.use(model):
        old = embeddings(model, batches)
    drift = 1 - F.cosine_similarity(old, embeddings(model, batches))
    return {"drift": max(0.0, float(drift.mean()))}  # rounding may say a little less


def _passages(tokenizer: Any, text: str, most: int) -> torch.Tensor:
    ids = tokenizer(text[:400_000], add_special_tokens=False, verbose=False)["input_ids"]
    length = max(1, min(most, len(ids) // PASSAGES))
    stride = max(1, (len(ids) - length) // (PASSAGES - 1))
    return torch.tensor([ids[start : start + length] for start in range(0, stride * PASSAGES, stride)])


def _loss(model: Any, passages: torch.Tensor) -> float:
    passages = passages.to(model.device)
    with evaluating(model):
        logits = model(input_ids=passages).logits[:, :-1].float()
    return float(F.cross_entropy(logits.flatten(0, 1), passages[:, 1:].flatten()))
