"""Who acts: for good and training (`activate`), or for a while and without gradients (`use`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from veneer.errors import AdapterError
from veneer.handle import Adapter, State, handle, in_order, state_of

Row = str | None | Sequence[str]


def activate(model: nn.Module, *names: Adapter | str, rows: Sequence[Row] | None = None) -> None:
    """From now on these adapters act, stacked in the order of attaching, and train; all others rest and are frozen.

    No name means the base alone. `rows` gives every row of a batch its own: a name, several names, or None for the
    base.
    """
    _route(model, names, rows)
    state = state_of(model)
    routes = state.routes
    acting = set(routes.active) if routes.rows is None else {name for row in routes.rows for name in row}
    for name, adapter in state.adapters.items():
        for parameter in adapter.parameters():
            parameter.requires_grad_(name in acting)


def _route(model: nn.Module, names: Sequence[Adapter | str], rows: Sequence[Row] | None) -> None:
    """Set who acts for whom, after checking every name."""
    if names and rows is not None:
        raise AdapterError("Name adapters for the whole batch or give `rows`, not both.")
    if rows is not None and not rows:
        raise AdapterError("rows is empty. Give one entry a row of the batch; None is the base.")
    state = state_of(model)
    chosen = [handle(model, name).name for name in names]
    by_row = None if rows is None else [_row(model, row) for row in rows]
    _refuse_without_merged(state, [chosen] if by_row is None else by_row)
    state.routes.active = in_order(state, chosen)
    state.routes.rows = None if by_row is None else tuple(in_order(state, row) for row in by_row)


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
def use(model: nn.Module, *names: Adapter | str, rows: Sequence[Row] | None = None) -> Iterator[nn.Module]:
    """Within, these adapters act (no name: the base alone), without gradients; afterwards what acted before.

    `rows` mixes adapters in one batch, one entry a row: `rows=["french", ("french", "law"), None]`. `generate` may
    expand rows for beams and returned sequences; the batch must be the first dimension inside the model. For training
    call `activate`: a `use` closed before `backward` would let gradient checkpointing recompute with other adapters.
    """
    routes = state_of(model).routes
    before = routes.active, routes.rows
    _route(model, names, rows)
    try:
        with torch.no_grad():
            yield model
    finally:
        routes.active, routes.rows = before
