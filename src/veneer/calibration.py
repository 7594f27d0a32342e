"""Starts that depend on data: deltas look at what reaches their places, or at the weights before quantization."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from veneer import places, site
from veneer.delta import Delta
from veneer.errors import AdapterError
from veneer.handle import Adapter, Claim, handle
from veneer.routing import use


def calibrate(model: nn.Module, adapter: Adapter | str, source: nn.Module | Iterable[Mapping[str, Any]]) -> None:
    """Show each delta that waits for it what its start is made from; call it before training.

    LoRA(init="eva") waits for inputs: `source` are batches, each what the model is called with. They run through the
    base alone, in the mode it is in; positions that a batch's `attention_mask` hides are not shown. LoRA(init="loftq")
    waits for weights: `source` is the dense model that the quantized base was made from.

    Raises AdapterError where no delta waits for this, or where one saw too little of it.
    """
    adapter = handle(model, adapter)
    wanted = "weight" if isinstance(source, nn.Module) else "inputs"
    waiting = [claim for claim in adapter.claims if claim.delta.waits == wanted]
    if not waiting:
        raise AdapterError(
            f"{adapter!r} does not wait for any {wanted}. LoRA(init='eva') waits for inputs, once, and "
            "LoRA(init='loftq') for weights."
        )
    if isinstance(source, nn.Module):
        _compare(waiting, source)
    else:
        _watch(waiting, model, source)
    for claim in waiting:
        try:
            claim.delta.settle()
        except AdapterError as error:
            raise AdapterError(f"{claim.place.path} {error}") from None


def _compare(waiting: Sequence[Claim], dense: nn.Module) -> None:
    inventory = places.weights(dense)
    twins = [inventory.get(claim.place.path.partition("[")[0]) for claim in waiting]
    for claim, twin in zip(waiting, twins, strict=True):
        if (
            twin is None
            or twin.shape[1:] != claim.place.shape[1:]
            or twin.format.quantized
            or not twin.weight.is_floating_point()
        ):
            raise AdapterError(
                f"{type(dense).__name__} has no dense weight of shape {claim.place.shape} at {claim.place.path}. Give "
                "the model that the quantized one was made from."
            )
    for claim, twin in zip(waiting, twins, strict=True):
        assert twin is not None
        claim.delta.observe(dataclasses.replace(twin, spans=claim.place.spans).read())


def _watch(waiting: Sequence[Claim], model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    with use(model):
        for batch in batches:
            mask = batch.get("attention_mask")
            hooks = [site.watch(claim.place.reader, partial(_show, claim.delta, mask)) for claim in waiting]
            try:
                model(**batch)
            finally:
                for hook in hooks:
                    hook.remove()


def _show(delta: Delta, mask: Any, x: Tensor) -> None:
    hides = isinstance(mask, Tensor) and mask.shape == x.shape[:2] and x.dim() == 3
    delta.observe(x[mask.to(x.device).bool()] if hides else x)
