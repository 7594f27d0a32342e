"""PEFT's PROMPT_TUNING and P_TUNING files: the prompt under one bare key, beside what was trained whole.

PEFT saves of a P_TUNING what its network has made, so both kinds are a `PromptTuning`. A file for an encoder-decoder
may hold as many rows again for the decoder, which PEFT (0.21.2) never reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from veneer import places
from veneer.delta import Method
from veneer.errors import CorruptFile, FileError, MethodError, listed
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import Entry, NotInPEFT, base_fields, fill, names
from veneer.methods import FullFineTuning, PromptTuning
from veneer.prompts import Plain
from veneer.seams import transformers

METHODS: tuple[type[Method], ...] = (PromptTuning,)
KEY = "prompt_embeddings"
WHOLE = "base_model."
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")

# Options that only say where the prompt came from, or that its tensors already contain.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "modules_to_save", "num_attention_heads", "num_layers", "num_transformer_submodules"),
    *("num_virtual_tokens", "token_dim", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"),
    *("tokenizer_name_or_path", "encoder_dropout", "encoder_hidden_size", "encoder_num_layers"),
    "encoder_reparameterization_type",
}


def to_tensors(claims: Sequence[Claim]) -> dict[str, Tensor]:
    """The prompt, and what was trained whole."""
    tensors = {KEY: _prompt(claims).embeddings.detach()}
    for claim in claims:
        if isinstance(claim.method, FullFineTuning):
            (value,) = claim.delta.parameters()
            for place in (claim.place, *claim.place.tied):
                tensors[f"{WHOLE}{place.path}"] = value.detach()
    return tensors


def from_tensors(claims: Sequence[Claim], tensors: dict[str, Tensor]) -> None:
    """Fill the prompt, and what was trained whole."""
    fill(_prompt(claims).embeddings, tensors[KEY])
    for claim in claims:
        if isinstance(claim.method, FullFineTuning):
            (value,) = claim.delta.parameters()
            fill(value, tensors[f"{WHOLE}{claim.place.path}"])


def to_config(adapter: Adapter) -> dict[str, Any]:
    """`adapter_config.json`; NotInPEFT where PEFT would compute something else from the same numbers."""
    fields = base_fields(adapter)
    reason = _other_task(adapter.model, fields["task_type"])
    if reason:
        raise NotInPEFT(reason)
    place = next(claim.place for claim in adapter.claims if isinstance(claim.method, PromptTuning))
    if place.path != places.find(adapter.model, "input", "input")[0].path:
        raise NotInPEFT(f"PEFT puts nothing in front of the tokens of {place.path}")
    length, width = _prompt(adapter.claims).embeddings.shape
    return {
        **fields,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "prompt_tuning_init": "RANDOM",
        "token_dim": width,
    }


def from_config(model: nn.Module, config: dict[str, Any], keys: set[str], file: str) -> list[Entry]:
    """The prompt, and what was trained whole beside it, that config and keys mean."""
    foreign = sorted(name for name, value in config.items() if value and name not in _HARMLESS)
    if foreign:
        raise FileError(f"{file} uses {listed(foreign)}, which Veneer's PromptTuning does not have.")
    reason = _other_task(model, config.get("task_type"))
    if reason:
        raise FileError(f"{file}: {reason}, so Veneer would answer otherwise. Train it again.")
    try:
        method = PromptTuning(config["num_virtual_tokens"])
    except (KeyError, MethodError) as error:
        raise CorruptFile(f"{file} is no config of a prompt: {error}.") from None
    whole = sorted(key.removeprefix(WHOLE) for key in keys - {KEY})
    for name in names(config, "modules_to_save", file):
        there = any(f".{name}." in f".{path}." for path, _ in model.named_modules())
        if there and not any(f".{name}." in f".{path}" for path in whole):
            raise CorruptFile(f"{file} says that {name} was trained whole, but its tensors are missing.")
    entries = [Entry(method, "input", [(place.path, None) for place in places.find(model, "input", "input")])]
    if whole:
        entries.append(Entry(FullFineTuning(), "modules_to_save", [(path, None) for path in whole]))
    return entries


def _prompt(claims: Sequence[Claim]) -> Plain:
    """The one prompt among the claims."""
    prompts = [claim.delta for claim in claims if isinstance(claim.delta, Plain)]
    if len(prompts) != 1:
        raise NotInPEFT(f"PEFT's files hold one prompt, not {len(prompts)}")
    return prompts[0]


def _other_task(model: nn.Module, task: str | None) -> str:
    """Why PEFT reads something else from a prompt on this model, or the empty string."""
    if task not in _TASKS:
        return f"PEFT has no prompt for {type(model).__name__} with the task type {task}"
    if task == "SEQ_CLS" and not transformers.is_causal(model):
        return f"PEFT classifies with {type(model).__name__} from the first position of the prompt, not of the tokens"
    return ""


__all__ = ["METHODS", "from_config", "from_tensors", "to_config", "to_tensors"]
