"""The base model and what makes its batches, as a recipe names them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import veneer
from veneer.errors import LossError, RecipeError
from veneer.quantizing import by_owner, chosen
from veneer.samples import named
from veneer.seams import loading
from veneer.seams.loss import ChunkedLoss
from veneer.seams.quiet import quiet
from veneer.train.recipe import Model
from veneer.train.tasks import TASKS


def processing(model: Model, task: str) -> Any:
    """The model's tokenizer; for images its image processor, for speech its processor with both."""
    return _loaded(TASKS[task].processing, model)


def base(model: Model, task: str, labels: list[str] | None) -> tuple[Any, list[str]]:
    """The model, on the accelerator if there is one, and the modules that its files have no weights for."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    options: dict[str, Any] = {"dtype": model.dtype, **TASKS[task].options(labels)}
    if model.quantization in ("bitsandbytes-4bit", "bitsandbytes-8bit"):
        options |= {"quantization_config": _bitsandbytes(model.quantization), "device_map": {"": str(device)}}
    options["output_loading_info"] = True
    load = partial(_loaded, TASKS[task].loader, model, **options)
    found, report = _packed(model, TASKS[task].loader, load) if model.quantization == "nf4" else load()
    fresh = sorted({key.rpartition(".")[0] for key in (*report["missing_keys"], *_misfits(report))})
    return found if "device_map" in options else found.to(device), fresh


def _packed(model: Model, loader: Any, load: Callable[..., Any]) -> tuple[Any, Any]:
    """The base in NF4, each weight packed as it is read, so that the dense model is never in memory."""
    method, where = veneer.NF4(), named.located(model.name)
    config = loading.config_of(str(where), model.revision)
    if loading.quantization(config) is not None:
        raise RecipeError(f"model.name {model.name} is stored in few bits already. Leave model.quantization out.")
    paths = by_owner(chosen(loading.without_weights(config, loader), None, ()))
    return loading.pack_while_loading(lambda packs: load(quantization_config=packs), paths, vars(method))


def _misfits(report: Any) -> list[str]:
    """Weights of another shape than the model's, in place of which there are new ones."""
    return [key for key, *_ in report["mismatched_keys"]]


def _bitsandbytes(quantization: str) -> Any:
    """transformers' own way to a base that bitsandbytes quantizes; NF4 with bfloat16 products, as QLoRA has it."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"model.quantization {quantization} needs bitsandbytes. Run: pip install bitsandbytes, or take nf4."
        )
    if quantization == "bitsandbytes-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


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
