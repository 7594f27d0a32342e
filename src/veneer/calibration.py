"""Starts that depend on data: batches run through the base, and deltas look at what reaches their places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from veneer import site
from veneer.delta import Delta
from veneer.errors import AdapterError
from veneer.handle import Adapter, handle
from veneer.routing import use


def calibrate(model: nn.Module, adapter: Adapter | str, batches: Iterable[Mapping[str, Any]]) -> None:
    """Run batches through the base alone, show each delta that waits for them its inputs, and let it start from those.

    A batch is what the model is called with; positions that its `attention_mask` hides are not shown. Calibrate in
    evaluation mode, and before training.

    Raises AdapterError where no delta waits for inputs, or where a delta saw too few of them.
    """
    adapter = handle(model, adapter)
    waiting = [claim for claim in adapter.claims if claim.delta.waits]
    if not waiting:
        raise AdapterError(f"{adapter!r} waits for no inputs. Only starts such as LoRA(init='eva') do, and only once.")
    with use(model):
        for batch in batches:
            mask = batch.get("attention_mask")
            hooks = [site.watch(claim.place.reader, partial(_show, claim.delta, mask)) for claim in waiting]
            try:
                model(**batch)
            finally:
                for hook in hooks:
                    hook.remove()
    for claim in waiting:
        try:
            claim.delta.settle()
        except AdapterError as error:
            raise AdapterError(f"{claim.place.path} {error}") from None


def _show(delta: Delta, mask: Any, x: Tensor) -> None:
    hides = isinstance(mask, Tensor) and mask.shape == x.shape[:2] and x.dim() == 3
    delta.observe(x[mask.to(x.device).bool()] if hides else x)
