"""The base model and its tokenizer, as a recipe names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import veneer
from veneer.errors import LossError, RecipeError
from veneer.samples import named
from veneer.samples.quiet import quiet
from veneer.seams.loss import ChunkedLoss
from veneer.train.recipe import Model

CLASSES: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}
"""The tasks that a recipe trains, and who loads their models."""


def tokenizer(model: Model) -> Any:
    """The model's tokenizer."""
    return _loaded(AutoTokenizer, model)


def base(model: Model, task: str, labels: list[str] | None) -> tuple[Any, list[str]]:
    """The model, on the accelerator if there is one, and the modules that its files have no weights for."""
    options: dict[str, Any] = {"dtype": model.dtype}
    if task == "regression":
        options |= {"num_labels": 1, "problem_type": "regression"}
    elif labels is not None:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
        options["num_labels"] = len(labels)
    found, report = _loaded(CLASSES[task], model, output_loading_info=True, **options)
    fresh = sorted({key.rpartition(".")[0] for key in report["missing_keys"]})
    if model.quantization == "nf4":
        veneer.quantize(found, veneer.NF4())
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return found.to(device), fresh


def chunked(model: Any, asked: str, parallel: str = "ddp") -> ChunkedLoss | str:
    """The model's loss in chunks, or why it stays whole; `asked` and `parallel` are a recipe's options."""
    if asked == "whole":
        return "as the recipe asks"
    if parallel == "fsdp":
        return "the head's weights are shared out"
    try:
        return veneer.chunk_loss(model)
    except LossError as reason:
        if asked == "chunked":
            raise RecipeError(f"training.loss: {reason}") from None
        return str(reason)


def _loaded(kind: Any, model: Model, **options: Any) -> Any:
    name = model.name
    where = named.located(name)
    if model.revision is not None:
        if Path(where).is_dir():
            raise RecipeError(f"model.revision is for Hub ids, and {name} lies on this machine. Leave it out.")
        options["revision"] = model.revision
    try:
        with quiet():
            return kind.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"model.name {name} cannot be loaded by {kind.__name__}: {reason}") from None
