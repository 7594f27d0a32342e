"""What a model has learned: its loss on held-out answers, the text it writes, and how close that is to a reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.samples.packages import demo_extra
from veneer.seams.quiet import quiet
from veneer.train.batch import Collator, by_length
from veneer.train.labels import IGNORED, Encoded


def held_out_loss(model: PreTrainedModel, rows: Sequence[Encoded], collator: Collator, batch_size: int = 16) -> float:
    """The mean negative log-likelihood of an answer token, over all answer tokens of all rows."""
    total, tokens = 0.0, 0
    for group in by_length([len(row["input_ids"]) for row in rows], batch_size):
        logits, targets = answer_logits(model, [rows[row] for row in group], collator)
        total += float(nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
        tokens += len(targets)
    return total / tokens


def answer_logits(model: PreTrainedModel, rows: Sequence[Encoded], collator: Collator) -> tuple[Tensor, Tensor]:
    """The logits (token, vocabulary) that predict the answers of one batch, and the tokens they should predict."""
    batch = on_device(model, collator(rows))
    labels = batch.pop("labels")[:, 1:]
    with evaluating(model):
        logits = model(**batch, use_cache=False).logits[:, :-1]
    asked = labels != IGNORED
    return logits[asked], labels[asked]


def write(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """The model's greedy answer to each prompt, in the order of the prompts."""
    collator = Collator.of(model, tokenizer)
    answers = [""] * len(prompts)
    for group in by_length([len(prompt) for prompt in prompts], batch_size):
        batch = on_device(model, collator.questions([prompts[row] for row in group]))
        with evaluating(model), quiet():
            ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=collator.padding)
        texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(group, texts, strict=True):
            answers[row] = text.strip()
    return answers


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Character n-gram F-score of a corpus (chrF2 by sacrebleu), 0 to 100."""
    return float(demo_extra("sacrebleu").corpus_chrf(list(answers), [list(references)]).score)


def on_device(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch where the model is."""
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
