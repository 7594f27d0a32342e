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

    Raises MethodError where the adapter has no prefix, trains it through a network (reparameterization), or the batch
    has too few positions or padding among them.
    """
    adapter = handle(model, adapter)
    prefixes = {id(c.place.reader): c for c in adapter.claims if isinstance(c.delta, (Slots, MLPSlots))}
    if not prefixes:
        raise MethodError(f"{adapter!r} has no prefix to start. Attach veneer.PrefixTuning.")
    if any(isinstance(claim.delta, MLPSlots) for claim in prefixes.values()):
        raise MethodError(
            f"{adapter!r} makes its prefix by a network, which cannot be started from tokens. Attach "
            "PrefixTuning(reparameterization=False)."
        )
    length = max(claim.delta.key.shape[1] for claim in prefixes.values())
    mask = batch.get("attention_mask")
    if mask is not None and not bool(mask[:, :length].all()):
        raise MethodError(f"The first {length} positions of the batch hold padding. Pad on the right, or give one row.")
    with use(model), transformers.without_dropout(model):
        seen = transformers.keys_and_values(model, set(prefixes), batch, -length)
    for key, claim in prefixes.items():
        own = seen.get(key, [])
        if not own or own[0][0].shape[2] < claim.delta.key.shape[1]:
            positions = own[0][0].shape[2] if own else 0
            raise MethodError(
                f"{claim.place.path} saw {positions} positions of the batch, and its prefix has "
                f"{claim.delta.key.shape[1]}. Give more tokens, or a shorter prefix."
            )
    for key, claim in prefixes.items():
        for parameter, calls in zip((claim.delta.key, claim.delta.value), zip(*seen[key], strict=True), strict=True):
            _fill(parameter, calls)


@torch.no_grad()
def _fill(parameter: Tensor, calls: tuple[Tensor, ...]) -> None:
    """The mean over calls (of a layer used several times) and rows."""
    parameter.copy_(torch.cat([call[:, :, : parameter.shape[1]].to(parameter.dtype) for call in calls]).mean(0))
