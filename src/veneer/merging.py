"""Folding an adapter into the weights, and taking it out or off again bit for bit.

Subtracting a merged change does not give the old weight back: in bfloat16 more than half of the entries come out
different. So `merge` keeps what it replaces, and `unmerge` puts it back.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from veneer.adapter import take_off
from veneer.delta import Delta, Weight, compute_dtype, row_index
from veneer.errors import AdapterError, NotMergeable, listed
from veneer.handle import Adapter, Claim, handle, in_order, state_of


def merge(model: nn.Module, adapter: Adapter | str, *, permanent: bool = False) -> None:
    """Fold an adapter into the base's weights, computed in float32 or wider and rounded once to the stored dtype.

    The stored weights are kept (a copy of each changed one), so that `unmerge` and `detach` restore them bit for bit.
    With `permanent=True` nothing is kept and the adapter is taken off: a plain model with the adapter's behaviour.

    Raises NotMergeable, before the model is touched, where a method has no weight form, a weight is shared with another
    module (a tied embedding and head), or its storage cannot take the change.
    """
    adapter = handle(model, adapter)
    state = state_of(model)
    if adapter.name in state.routes.merged:
        raise AdapterError(f"Adapter '{adapter.name}' is merged already. Call veneer.unmerge first.")
    _refuse_unmergeable(model, adapter)
    _refuse_replaced(model, adapter)
    _fold(adapter)
    if permanent:
        adapter.originals.clear()
        take_off(model, adapter)
        return
    routes = state.routes
    routes.merged.append(adapter.name)
    routes.active = in_order(state, [*routes.active, adapter.name])
    if routes.rows is not None:
        routes.rows = tuple(in_order(state, [*row, adapter.name]) for row in routes.rows)
    torch.compiler.reset()


@torch.no_grad()
def _fold(adapter: Adapter) -> None:
    kept: set[tuple[int, str]] = set()
    try:
        for one in sorted(adapter.claims, key=lambda one: not isinstance(one.delta, Weight)):  # as a forward does
            place = one.place
            if place.key not in kept:
                kept.add(place.key)
                adapter.originals.append((place.owner, place.parameter, place.weight.detach().clone()))
            dense = place.read()
            try:
                place.write(one.delta.merge(dense.to(compute_dtype(dense.dtype))))
            except NotMergeable as error:
                raise NotMergeable(f"{place.path}: {error}") from None
            if place.bias and type(one.delta).merge_bias is not Delta.merge_bias:
                _fold_bias(adapter, one)
    except BaseException:  # an interrupt too must leave no half-merged model
        _restore(adapter)
        raise


def _fold_bias(adapter: Adapter, claim: Claim) -> None:
    owner, name = claim.place.owner, claim.place.bias.rpartition(".")[2]
    bias = cast(nn.Parameter, owner._parameters[name])
    adapter.originals.append((owner, name, bias.detach().clone()))
    rows = row_index(claim.place.spans or ((0, len(bias)),), bias.device)
    bias[rows] = claim.delta.merge_bias(bias[rows].to(compute_dtype(bias.dtype))).to(bias.dtype)


@torch.no_grad()
def _restore(adapter: Adapter) -> None:
    for owner, name, stored in reversed(adapter.originals):
        cast(nn.Parameter, owner._parameters[name]).data.copy_(stored)
    adapter.originals.clear()


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
        shared = owners[id(one.place.weight)]
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


def unmerge(model: nn.Module, adapter: Adapter | str) -> None:
    """Put back the weights that `merge` kept, bit for bit; the adapter acts through its hooks again.

    Raises AdapterError where it is not merged, or another adapter was merged after it.
    """
    adapter = handle(model, adapter)
    merged = state_of(model).routes.merged
    if adapter.name not in merged:
        raise AdapterError(f"Adapter '{adapter.name}' is not merged.")
    if merged[-1] != adapter.name:
        raise AdapterError(f"Adapter '{merged[-1]}' was merged after '{adapter.name}'. Unmerge '{merged[-1]}' first.")
    _restore(adapter)
    merged.remove(adapter.name)
    torch.compiler.reset()


def detach(model: nn.Module, adapter: Adapter | str) -> None:
    """Take an adapter off. A merged one is unmerged first, so that the model is again what it was, bit for bit.

    With the last adapter gone every parameter gets back the `requires_grad` it had before.
    """
    adapter = handle(model, adapter)
    if adapter.name in state_of(model).routes.merged:
        unmerge(model, adapter)
    take_off(model, adapter)
