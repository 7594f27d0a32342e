"""Where a prefix starts: from the keys and values that real tokens have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import MethodError
from veneer.handle import Adapter, handle
from veneer.routing import use
from veneer.seams import transformers
from veneer.slots import MLPSlots, Slots


def start_prefix(model: nn.Module, adapter: Adapter | str, batch: Mapping[str, Any]) -> None:
    """Start a prefix at the keys and values of the batch's first positions, as the base computes them.

    `batch` is what the model is called with, such as a tokenizer's output; its rows are averaged. The base alone runs,
    without dropout. A model that rotates keys by their position runs at positions -length, -length + 1, ..., so that
    the prefix starts as the very context that those tokens would be in front of the text. Where positions are learned
    the tokens stand at positions 0, 1, ..., as they do in a text.

    Raises MethodError where the adapter has no prefix, trains it through a network (reparameterization), the model
    attends in code of its own, or the batch has too few positions or padding among them.
    """
    adapter = handle(model, adapter)
    found = {claim.place.path: claim for claim in adapter.claims if isinstance(claim.delta, (Slots, MLPSlots))}
    if not found:
        raise MethodError(f"{adapter!r} has no prefix to start. Attach veneer.PrefixTuning.")
    prefixes = {path: claim.delta for path, claim in found.items() if isinstance(claim.delta, Slots)}
    if len(prefixes) < len(found):
        raise MethodError(
            f"{adapter!r} makes its prefix by a network, which cannot be started from tokens. Attach "
            "PrefixTuning(reparameterization=False)."
        )
    for path in prefixes:
        if found[path].place.functional:
            raise MethodError(f"{path} attends in code of its own, where its keys cannot be seen. Train from chance.")
    length = max(slots.key.shape[1] for slots in prefixes.values())
    mask = batch.get("attention_mask")
    if mask is not None and not bool(mask[:, :length].all()):
        raise MethodError(f"The first {length} positions of the batch hold padding. Pad on the right, or give one row.")
    readers = {path: found[path].place.reader for path in prefixes}
    with use(model), transformers.without_dropout(model):
        seen = transformers.keys_and_values(model, readers, batch, -length)
    for path, slots in prefixes.items():
        positions = min((key.shape[2] for key, _ in seen[path]), default=0)
        if positions < slots.key.shape[1]:
            raise MethodError(
                f"{path} saw {positions} positions of the batch, and its prefix has {slots.key.shape[1]}. Give more "
                "tokens, or a shorter prefix."
            )
    for path, slots in prefixes.items():
        keys, values = zip(*seen[path], strict=True)
        _fill(slots.key, keys)
        _fill(slots.value, values)


@torch.no_grad()
def _fill(parameter: Tensor, calls: tuple[Tensor, ...]) -> None:
    """The mean over calls (of a layer used several times) and rows."""
    parameter.copy_(torch.cat([call[:, :, : parameter.shape[1]].to(parameter.dtype) for call in calls]).mean(0))
