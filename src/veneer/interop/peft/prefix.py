"""PEFT's PREFIX_TUNING files: one tensor `prompt_embeddings` [length, layers · 2 · kv heads · head width].

PEFT seeds the cache with the prefix, so that the text starts at position `length`; here it starts at 0. In models that
rotate keys by their position the two are one prefix, turned by `length` positions. Where positions are learned, tokens
start at `length` here too if the prefix has that as its `position_offset`; a prefix without it has no such file. Two
differences are left where keys are turned: PEFT's prefix slides out of a sliding window, and uses up positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer import places
from veneer.delta import Method
from veneer.errors import CorruptFile, FileError, PlaceError, UnreadableModel
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import Entry, NotInPEFT, base_fields, fill
from veneer.methods import PrefixTuning
from veneer.seams import transformers
from veneer.slots import Slots

METHODS: tuple[type[Method], ...] = (PrefixTuning,)
KEY = "prompt_embeddings"


def to_tensors(claims: Sequence[Claim]) -> dict[str, Tensor]:
    """All layers' keys and values in one tensor, the keys turned to PEFT's positions."""
    parts = []
    for claim, slots in _layers(claims):
        length = slots.key.shape[1]
        learned = _offset(claim)
        if learned not in (0, length):
            raise NotInPEFT(f"PEFT starts the text at position {length}, and this prefix at {learned}")
        try:
            parts += [slots.key.detach() if learned else claim.place.turned(slots.key, length), slots.value.detach()]
        except UnreadableModel as error:
            raise NotInPEFT(
                f"PEFT starts the text at position {length}: {error} Where positions are learned, train with "
                f"PrefixTuning(length={length}, position_offset={length})"
            ) from None
    return {KEY: torch.stack(parts).permute(2, 0, 1, 3).flatten(1)}


def from_tensors(claims: Sequence[Claim], tensors: dict[str, Tensor]) -> None:
    """Fill the claims' keys, turned back, and values."""
    layers = _layers(claims)
    heads, length, _ = layers[0][1].key.shape
    parts = tensors[KEY].unflatten(1, (2 * len(layers), heads, -1)).permute(1, 2, 0, 3)
    for (claim, slots), key, value in zip(layers, parts[::2], parts[1::2], strict=True):
        fill(slots.key, key if _offset(claim) else claim.place.turned(key, -length))
        fill(slots.value, value)


def to_config(adapter: Adapter) -> dict[str, Any]:
    """`adapter_config.json` for a prefix at every layer of a decoder."""
    layers = _layers(adapter.claims)
    every = [place.path for place in places.find(adapter.model, "attention", "attention")]
    if [claim.place.path for claim, _ in layers] != every or not transformers.is_decoder(adapter.model):
        raise NotInPEFT("PEFT's prefixes stand at every attention of a decoder-only model")
    heads, length, width = layers[0][1].key.shape
    return {
        **base_fields(adapter),
        "encoder_hidden_size": heads * width,
        "num_attention_heads": heads,
        "num_layers": len(layers),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "token_dim": heads * width,
    }


def from_config(model: nn.Module, config: dict[str, Any], keys: set[str], file: str) -> list[Entry]:
    """A prefix at every attention; refuses models whose text would start at another position than in training."""
    length = config.get("num_virtual_tokens")
    if not isinstance(length, int) or length < 1:
        raise CorruptFile(f"{file}: num_virtual_tokens is {length!r}, not a number of positions.")
    if config.get("modules_to_save"):
        raise FileError(f"{file}: modules_to_save beside a prefix is not read. Train the modules with Veneer.")
    if config.get("num_transformer_submodules") not in (None, 1) or not transformers.is_decoder(model):
        raise FileError(f"{file} is read for decoder-only models; {type(model).__name__} is none.")
    found = places.find(model, "attention", "attention")
    here: list[tuple[str, Any]] = [(place.path, None) for place in found]
    if "positions" in found[0].sources:
        return [Entry(PrefixTuning(length=length, position_offset=length), "attention", here)]
    try:
        for place in found:
            place.turned(torch.zeros(place.shape[0], 1, place.shape[1]), -length)
    except PlaceError as error:
        raise FileError(
            f"{file}: PEFT starts the text at position {length}, which a prefix can make up for only where positions "
            f"are learned or rotate the keys. {error} Train the prefix with Veneer."
        ) from None
    return [Entry(PrefixTuning(length=length), "attention", here)]


def _offset(claim: Claim) -> int:
    """Where the tokens start under this prefix."""
    method = claim.method
    return method.position_offset if isinstance(method, PrefixTuning) else 0


def _layers(claims: Sequence[Claim]) -> list[tuple[Claim, Slots]]:
    """The claims in the order of the layers; refuses what one tensor cannot hold."""
    layers = [(claim, claim.delta) for claim in claims if isinstance(claim.delta, Slots)]
    if len(layers) < len(claims) or len({claim.place.path for claim in claims}) < len(claims):
        raise NotInPEFT("PEFT's prefixes are one prefix at each attention and nothing else")
    if len({(slots.key.shape, slots.value.shape) for _, slots in layers} | {(layers[0][1].value.shape,) * 2}) > 1:
        raise NotInPEFT("PEFT's prefixes have keys and values of one shape at every layer")
    return layers
