"""Who acts: for good and training (`activate`), or for a while and without gradients (`use`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from veneer import places
from veneer.errors import AdapterError
from veneer.handle import Adapter, State, handle, in_order, state_of

Row = str | None | Sequence[str]


def activate(
    model: nn.Module, *names: Adapter | str, rows: Sequence[Row] | None = None, drop_layers: Collection[int] = ()
) -> None:
    """From now on these adapters act, stacked in the order of attaching, and train; all others rest and are frozen.

    No name means the base alone. `rows` gives every row of a batch its own: a name, several names, or None for the
    base. In the blocks numbered in `drop_layers` no adapter acts or trains (AdapterDrop, Rücklé et al., EMNLP 2021,
    arXiv:2010.11918): give another `range(n)` at each step to train for any n, and `range(n)` for good to leave the
    lowest n blocks to the base. An encoder's and a decoder's blocks of one number go together.
    """
    _route(model, names, rows, drop_layers)
    state = state_of(model)
    routes = state.routes
    acting = set(routes.active) if routes.rows is None else {name for row in routes.rows for name in row}
    for name, adapter in state.adapters.items():
        for parameter in adapter.parameters():
            parameter.requires_grad_(name in acting)
        for claim in adapter.claims:
            if claim.place.path in routes.dropped:
                claim.delta.requires_grad_(False)


def _route(
    model: nn.Module, names: Sequence[Adapter | str], rows: Sequence[Row] | None, drop_layers: Collection[int]
) -> None:
    """Set who acts for whom and where, after checking every name."""
    if names and rows is not None:
        raise AdapterError("Name adapters for the whole batch or give `rows`, not both.")
    if rows is not None and not rows:
        raise AdapterError("rows is empty. Give one entry a row of the batch; None is the base.")
    state = state_of(model)
    chosen = [handle(model, name).name for name in names]
    by_row = None if rows is None else [_row(model, row) for row in rows]
    _refuse_without_merged(state, [chosen] if by_row is None else by_row)
    acting = chosen if by_row is None else [name for row in by_row for name in row]
    dropped = _dropped(model, state, acting, drop_layers)
    state.routes.dropped = dropped
    state.routes.active = in_order(state, chosen)
    state.routes.route(model, None if by_row is None else [in_order(state, row) for row in by_row])


def _dropped(model: nn.Module, state: State, acting: Sequence[str], layers: Collection[int]) -> frozenset[str]:
    """Paths of the places in these layers; AdapterError where there are none, or where weights were merged."""
    if not layers:
        return frozenset()
    if merged := [name for name in acting if name in state.routes.merged]:
        raise AdapterError(
            f"Adapter '{merged[0]}' is merged into the weights, so no layer can do without it. Unmerge it."
        )
    numbers = places.layers(model, (claim.place for name in acting for claim in state.adapters[name].claims))
    if missing := sorted(set(layers) - set(numbers.values())):
        there = sorted(set(numbers.values()) - {-1})
        raise AdapterError(f"drop_layers names {missing}, where no acting adapter is. They are in {there}.")
    return frozenset(path for path, number in numbers.items() if number in layers)


def _row(model: nn.Module, row: Row) -> list[str]:
    names = [] if row is None else [row] if isinstance(row, str) else list(row)
    return [handle(model, name).name for name in names]


def _refuse_without_merged(state: State, groups: Sequence[Sequence[str]]) -> None:
    for name in state.routes.merged:
        if any(name not in group for group in groups):
            raise AdapterError(
                f"Adapter '{name}' is merged into the weights, so nothing can run without it. "
                "Call veneer.unmerge first."
            )


@contextmanager
def use(
    model: nn.Module, *names: Adapter | str, rows: Sequence[Row] | None = None, drop_layers: Collection[int] = ()
) -> Iterator[nn.Module]:
    """Within, these adapters act (no name: the base alone), without gradients; afterwards what acted before.

    `rows` mixes adapters in one batch, one entry a row: `rows=["french", ("french", "law"), None]`. `generate` may
    expand rows for beams and returned sequences; the batch must be the first dimension inside the model. `drop_layers`
    are blocks left to the base, as in `activate`. For training call `activate`: a `use` closed before `backward` would
    let gradient checkpointing recompute with other adapters.
    """
    routes = state_of(model).routes
    before, mixed = (routes.active, routes.dropped), routes.rows
    _route(model, names, rows, drop_layers)
    try:
        with torch.no_grad():
            yield model
    finally:
        routes.active, routes.dropped = before
        routes.route(model, mixed)
