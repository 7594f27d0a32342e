"""transformers' own interfaces: the attention registry, embeddings and heads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import FileError

Observer = Callable[[nn.Module, Tensor, Tensor, Tensor, Callable[[], Any]], Any]


def is_pretrained(model: nn.Module) -> bool:
    """Whether the model is one of transformers'; never imports it."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def input_embedding(model: Any) -> nn.Module | None:
    """The token embedding, or None."""
    if not is_pretrained(model):
        return None
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Embedding) else None


def head(model: Any) -> nn.Module | None:
    """The output projection over the vocabulary, or None."""
    if not is_pretrained(model):
        return None
    found = model.get_output_embeddings()
    return found if isinstance(found, nn.Module) else None


def checkpointed(model: nn.Module) -> list[str]:
    """Paths of the blocks that gradient checkpointing recomputes as a whole."""
    layers = sys.modules.get("transformers.modeling_layers")
    if layers is None:
        return []
    return [path for path, module in model.named_modules() if isinstance(module, layers.GradientCheckpointingLayer)]


def describe(model: Any) -> dict[str, str]:
    """What an adapter's file says of its base model: class, model type, name or path."""
    described = {"class": type(model).__name__}
    if is_pretrained(model):
        described |= {"model_type": model.config.model_type, "name_or_path": model.config.name_or_path or ""}
    return described


@contextmanager
def observed_attention(observe: Observer) -> Iterator[None]:
    """Within, every attention through transformers' interface is handed to `observe` with its operands."""
    from transformers.modeling_utils import AttentionInterface

    original = AttentionInterface.get_interface

    def get_interface(self: Any, implementation: Any, default: Any) -> Any:
        attend = original(self, implementation, default)

        def observed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            return observe(module, query, key, value, lambda: attend(module, query, key, value, *args, **kwargs))

        return observed

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        AttentionInterface.get_interface = original  # type: ignore[method-assign]


def without_weights(folder: Path) -> nn.Module:
    """The model a folder's config describes, on the meta device: shapes without numbers."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        built: nn.Module = kind(config) if kind else transformers.AutoModel.from_config(config)
    return built


def language_model(name: str) -> nn.Module:
    """A causal language model in the dtype it is stored in; FileError where there is none."""
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileError(f"{name} cannot be loaded as a causal language model: {reason}") from None
    return model


def save_language_model(model: Any, source: str, folder: Path) -> None:
    """Write a model, with the tokenizer of its source where it has one, into a folder that appears when it is whole."""
    from transformers import AutoTokenizer

    partial = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(partial)
    try:
        AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    except (OSError, ValueError) as error:
        print(f"veneer: {source} has no tokenizer to copy ({str(error).splitlines()[0]})", file=sys.stderr)
    partial.rename(folder)
