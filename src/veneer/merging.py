"""Folding an adapter into the weights, and taking it out or off again bit for bit.

Subtracting a merged change does not give the old weight back: in bfloat16 more than half of the entries come out
different. So `merge` keeps what it replaces, and `unmerge` puts it back.

A quantized weight becomes dense: an adapter is trained beside the numbers that the bits stand for, dequantize(W4), and
rounding the sum to so few bits again would lose most of a small change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from veneer import checkpoints, drift, site
from veneer.adapter import take_off
from veneer.changes import depth, outwards
from veneer.delta import Delta, Place, Weight, compute_dtype, row_index
from veneer.drift import Drift
from veneer.errors import AdapterError, NotMergeable, listed
from veneer.handle import Adapter, handle, in_order, state_of
from veneer.originals import Storage, Values
from veneer.routing import use


def merge(
    model: nn.Module,
    adapter: Adapter | str,
    *,
    permanent: bool = False,
    requantize: bool = False,
    check: Mapping[str, Any] | None = None,
) -> Drift | None:
    """Fold an adapter into the base's weights, computed in float32 or wider and rounded once to the stored dtype.

    The stored weights are kept (a copy of each changed one), so that `unmerge` and `detach` restore them bit for bit.
    With `permanent=True` nothing is kept and the adapter is taken off: a plain model with the adapter's behaviour.

    A quantized linear that the adapter changes becomes a plain one: the numbers that its bits stand for plus the
    change, in the dtype of the model's other weights. With `requantize=True` it is then quantized again, as it was,
    which loses part of the change. With a batch to `check`, what merging costs is measured on it and returned.

    Raises NotMergeable, before the model is touched, where a method has no weight form, a weight is shared with another
    module (a tied embedding and head), or its storage cannot take the change.
    """
    adapter = handle(model, adapter)
    routes = state_of(model).routes
    if check is None:
        _merge(model, adapter, permanent, requantize)
        return None
    acting = in_order(state_of(model), [*routes.active, adapter.name])
    with use(model, *acting):
        before = drift.logits(model, check)
    _merge(model, adapter, permanent, requantize)
    with use(model, *(name for name in acting if not permanent or name != adapter.name)):
        return drift.between(before, drift.logits(model, check))


def _merge(model: nn.Module, adapter: Adapter, permanent: bool, requantize: bool) -> None:
    state = state_of(model)
    if adapter.name in state.routes.merged:
        raise AdapterError(f"Adapter '{adapter.name}' is merged already. Call veneer.unmerge first.")
    if dropped := [one.place.path for one in adapter.claims if one.place.path in state.routes.dropped]:
        raise AdapterError(
            f"Adapter '{adapter.name}' is left out of {listed(dropped)} by drop_layers, which merging would undo. Call "
            "veneer.activate without drop_layers first."
        )
    _refuse_unmergeable(model, adapter)
    _refuse_replaced(model, adapter)
    _refuse_measured(model, adapter)
    _refuse_between(model, adapter)
    if requantize and not any(place.format.now(place.owner).quantized for place in _owners(adapter)):
        raise AdapterError(f"Nothing that adapter '{adapter.name}' changes is quantized. Leave requantize out.")
    _fold(adapter, activations_dtype(model), requantize)
    if permanent:
        adapter.originals.clear()
        take_off(model, adapter)
        return
    routes = state.routes
    routes.merged = (*routes.merged, adapter.name)
    checkpoints.merged(model, True)
    routes.active = in_order(state, [*routes.active, adapter.name])
    if routes.rows is not None:
        routes.route(model, [in_order(state, [*row, adapter.name]) for row in routes.rows])
    torch.compiler.reset()


@torch.no_grad()
def _fold(adapter: Adapter, dtype: torch.dtype, requantize: bool) -> None:
    kept: set[tuple[int, str]] = set()
    unpacked: set[tuple[int, str]] = set()
    again: list[Callable[[], None]] = []

    def keep(owner: nn.Module, name: str) -> bool:
        """Keep a parameter before it is first changed; whether it was not yet."""
        key = id(owner), name
        if key in kept:
            return False
        kept.add(key)
        if key not in unpacked:
            adapter.originals.append(Values(owner, name))
        return True

    try:
        for place in _owners(adapter):
            if place.format.now(place.owner).quantized:
                adapter.originals.append(Storage(place.owner))
                unpacked |= {(id(place.owner), name) for _, name in place.format.weights(place.owner)}
                try:
                    again.append(place.format.unpack(place.owner, dtype))
                except NotMergeable as error:
                    raise NotMergeable(f"{place.path}: {error}") from None
        for one in outwards(adapter.claims):
            place = one.place
            if not keep(place.owner, place.parameter) and one.delta.measures:
                raise NotMergeable(
                    f"{place.path}: {type(one.method).__name__} measures the base's weight, which another method of "
                    "this adapter changes first. Keep it attached, or put it first in the tuple."
                )
            dense = place.read()
            try:
                place.write(one.delta.merge(dense.to(compute_dtype(dense.dtype))))
            except NotMergeable as error:
                raise NotMergeable(f"{place.path}: {error}") from None
            if place.bias and type(one.delta).merge_bias is not Delta.merge_bias:
                name = place.bias.rpartition(".")[2]
                keep(place.owner, name)
                bias = cast(nn.Parameter, place.owner._parameters[name])
                rows = row_index(place.spans or ((0, len(bias)),), bias.device)
                bias[rows] = one.delta.merge_bias(bias[rows].to(compute_dtype(bias.dtype))).to(bias.dtype)
        if requantize:
            for quantize in again:
                quantize()
        elif unpacked:
            checkpoints.unpacked(adapter.model)
    except BaseException:  # an interrupt too must leave no half-merged model
        _restore(adapter)
        raise


def _owners(adapter: Adapter) -> list[Place]:
    """One place of each weight that the adapter changes."""
    return list({one.place.key: one.place for one in adapter.claims}.values())


def _restore(adapter: Adapter) -> None:
    packed = any(isinstance(original, Storage) for original in adapter.originals)
    for original in reversed(adapter.originals):
        original.restore()
    adapter.originals.clear()
    if packed:
        checkpoints.unpacked(adapter.model)


def activations_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the base's first weight that is stored as a number, which is that of what flows through it."""
    parameters = (p for _, module in site.base_modules(model) for p in module.parameters(recurse=False))
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.get_default_dtype())


def _refuse_unmergeable(model: nn.Module, adapter: Adapter) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for one in adapter.claims:
        if not one.delta.mergeable:
            raise NotMergeable(
                f"{type(one.method).__name__} acts on activations; it has no merged weight. Keep it attached, or use a "
                "weight method."
            )
        shared = owners.get(id(one.place.weight), [one.place.path])
        if len(shared) > 1 + len(one.place.tied):
            raise NotMergeable(
                f"{shared[0]} is tied to {listed(shared[1:])}, which merging would change too. Untie them first, or "
                "keep the adapter attached."
            )


def _refuse_replaced(model: nn.Module, adapter: Adapter) -> None:
    """A weight that another adapter changes as it is read would hide what is merged into it."""
    mine = {one.place.key for one in adapter.claims}
    for other in state_of(model).adapters.values():
        for one in other.claims:
            resting = other is adapter or other.name in state_of(model).routes.merged
            if not resting and isinstance(one.delta, Weight) and one.place.key in mine:
                raise AdapterError(
                    f"Adapter '{other.name}' changes {one.place.path} as it is read, so '{adapter.name}' cannot be "
                    f"merged below it. Merge or detach '{other.name}' first."
                )


def _refuse_measured(model: nn.Module, adapter: Adapter) -> None:
    """The weight that another adapter measures (DoRA its norms) must not change below it."""
    state = state_of(model)
    for other in state.adapters.values():
        if other is adapter or other.name in state.routes.merged:
            continue
        for one in other.claims:
            if one.delta.measures and any(one.place.overlaps(mine.place) for mine in adapter.claims):
                raise AdapterError(
                    f"Adapter '{other.name}' measures the weight of {one.place.path}, so '{adapter.name}' cannot be "
                    f"merged or unmerged below it. Merge or detach '{other.name}' first."
                )


def _refuse_between(model: nn.Module, adapter: Adapter) -> None:
    """What acts between an adapter and the weight cannot be passed over, unless both only add."""
    state = state_of(model)
    position = {name: i for i, name in enumerate(state.routes.order)}
    for other in state.adapters.values():
        if other is adapter or other.name in state.routes.merged:
            continue
        later = position[other.name] > position[adapter.name]
        for one in other.claims:
            for mine in adapter.claims:
                if (one.delta.additive and mine.delta.additive) or not one.place.overlaps(mine.place):
                    continue
                near, far = depth(one.delta), depth(mine.delta)
                if near < far or (near == far and later == (far == 2)):
                    raise AdapterError(
                        f"Adapter '{other.name}' acts between '{adapter.name}' and the weight of {one.place.path}, "
                        f"which merging would pass over. Merge or detach '{other.name}' first."
                    )


def unmerge(model: nn.Module, adapter: Adapter | str) -> None:
    """Put back the weights that `merge` kept, bit for bit; the adapter acts through its hooks again.

    Raises AdapterError where it is not merged, or another adapter was merged after it.
    """
    adapter = handle(model, adapter)
    routes = state_of(model).routes
    merged = routes.merged
    if adapter.name not in merged:
        raise AdapterError(f"Adapter '{adapter.name}' is not merged.")
    if merged[-1] != adapter.name:
        raise AdapterError(f"Adapter '{merged[-1]}' was merged after '{adapter.name}'. Unmerge '{merged[-1]}' first.")
    _refuse_measured(model, adapter)
    _restore(adapter)
    routes.merged = merged[:-1]
    routes.route(model, routes.rows)
    checkpoints.merged(model, bool(routes.merged))
    torch.compiler.reset()


def detach(model: nn.Module, adapter: Adapter | str) -> None:
    """Take an adapter off. A merged one is unmerged first, so that the model is again what it was, bit for bit.

    With the last adapter gone every parameter gets back the `requires_grad` it had before.
    """
    adapter = handle(model, adapter)
    if adapter.name in state_of(model).routes.merged:
        unmerge(model, adapter)
    take_off(model, adapter)
