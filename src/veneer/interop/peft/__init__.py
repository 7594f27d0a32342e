"""Hugging Face PEFT's adapter files: `adapter_config.json` says how to read `adapter_model.safetensors`.

Keys are `base_model.model.<module>.<parameter>`. Each `peft_type` is one `Kind`, in a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from veneer.errors import FileError
from veneer.handle import Adapter, Claim
from veneer.interop.peft import (
    adalora,
    hira,
    ia3,
    ln_tuning,
    loha,
    lora,
    miss,
    oft,
    prefix,
    prompt,
    shira,
    trainable_tokens,
    vera,
)
from veneer.interop.peft.common import Entry, Kind, NotInPEFT
from veneer.methods import FullFineTuning

KINDS: dict[str, Kind] = {
    "ADALORA": adalora.KIND,
    "HIRA": hira.KIND,
    "IA3": ia3.KIND,
    "LN_TUNING": ln_tuning.KIND,
    "LOHA": loha.KIND,
    "LORA": lora,
    "MISS": miss.KIND,
    "OFT": oft.KIND,
    "PREFIX_TUNING": prefix,
    "PROMPT_TUNING": prompt,
    "P_TUNING": prompt,
    "SHIRA": shira.KIND,
    "TRAINABLE_TOKENS": trainable_tokens.KIND,
    "VERA": vera.KIND,
}
ROUNDED = {"PREFIX_TUNING"}
"""Kinds that hold other numbers than the adapter, equal up to rounding; the adapter's own are saved beside them."""


def to_files(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of an adapter; NotInPEFT where PEFT has no such thing."""
    peft_type, kind = _kind(adapter.claims)
    return kind.to_tensors(adapter.claims), {"peft_type": peft_type, **kind.to_config(adapter)}


def to_tensors(claims: Sequence[Claim]) -> dict[str, Tensor]:
    """The tensors of an adapter with these claims; NotInPEFT where PEFT has no such thing."""
    return _kind(claims)[1].to_tensors(claims)


def from_tensors(claims: Sequence[Claim], tensors: dict[str, Tensor]) -> None:
    """Fill the claims' deltas from tensors that have the keys and shapes of `to_tensors`."""
    _kind(claims)[1].from_tensors(claims, tensors)


def from_config(model: nn.Module, config: dict[str, Any], keys: set[str], file: str) -> list[Entry]:
    """The methods and places that PEFT's config and tensor keys mean on this model, as `Kind.from_config` says."""
    kind = KINDS.get(str(config.get("peft_type")))
    if kind is None:
        raise FileError(f"{file} holds a {config.get('peft_type')!r} adapter; Veneer reads PEFT's {', '.join(KINDS)}.")
    return kind.from_config(model, config, keys, file)


def _kind(claims: Sequence[Claim]) -> tuple[str, Kind]:
    methods = {type(claim.method) for claim in claims} - {FullFineTuning}
    if not methods:
        raise NotInPEFT("PEFT's files hold trained modules only beside a method such as LoRA")
    for peft_type, kind in KINDS.items():
        if methods <= set(kind.METHODS):
            return peft_type, kind
    raise NotInPEFT(f"PEFT has no file for {', '.join(sorted(method.__name__ for method in methods))} in one adapter")


def without_copies(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that count, of those that a file holds.

    With bias="all" PEFT writes a trained module's bias three times; the one under the module's own path counts. Of a
    prompt only the first `num_virtual_tokens` rows are read.
    """
    kept = {key: t for key, t in tensors.items() if ".modules_to_save." not in key and ".original_module." not in key}
    if config.get("num_transformer_submodules") == 2 and prompt.KEY in kept:
        kept[prompt.KEY] = kept[prompt.KEY][: config.get("num_virtual_tokens")]
    return kept
