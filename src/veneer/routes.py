"""Routes: which adapters act on a model, and for which rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from veneer.errors import RoutingError
from veneer.mixing import Mix


@dataclass
class Routes:
    """Which adapters act, and for which rows of a batch. One object a model, shared by all its sites.

    `active` holds for every row unless `rows` gives each row its own set. `merged` adapters act through the base's
    weights, so sites pass over them. Both are kept in the order of attaching, which is the order of stacking.
    """

    order: list[str] = field(default_factory=list)
    active: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] | None = None
    mix: Mix | None = None
    """`rows` in the form in which they are served together; there whenever `rows` are."""
    merged: tuple[str, ...] = ()
    dropped: frozenset[str] = frozenset()
    """Paths of places where nothing acts, whoever is active."""

    def route(self, model: nn.Module, rows: Sequence[Sequence[str]] | None) -> None:
        """Give each row of the model's batches its adapters; None gives all rows the active ones."""
        self.rows = None if rows is None else tuple(map(tuple, rows))
        self.mix = None
        if self.rows is not None:
            device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
            self.mix = Mix([name for name in self.order if name not in self.merged], self.rows, device)

    def look_again(self) -> None:
        """What hangs on the deltas' calls has changed."""
        if self.mix is not None:
            self.mix.forget()

    def served(self, name: str, batch: Tensor | None, path: str) -> list[int] | None:
        """The rows of a batch that `name` acts on; None means all, [] none."""
        if name in self.merged:
            return []
        if self.rows is None:
            return None if name in self.active else []
        mine = [name in row for row in self.rows]
        if all(mine):
            return None
        if not any(mine):
            return []
        repeats = repeated(len(self.rows), batch, path)
        return [row * repeats + k for row, me in enumerate(mine) if me for k in range(repeats)]

    def serves(self, name: str, path: str) -> bool:
        """Whether `name` acts at the place of this path, on all rows or some."""
        acting = self.active if self.rows is None else {each for row in self.rows for each in row}
        return name in acting and name not in self.merged and path not in self.dropped


def repeated(rows: int, batch: Tensor | None, path: str) -> int:
    """How many rows of the batch each of `rows` entries has; RoutingError where it does not come out even.

    `generate` repeats each row for its beams and its returned sequences, side by side, and some models fold other
    dimensions into the batch in the same order; so a batch k times as long as `rows` gives each entry k rows.
    """
    size = 0 if batch is None else len(batch)
    repeats, left = divmod(size, rows)
    if left or not repeats:
        raise RoutingError(
            f"rows names {rows} rows but a batch of {size} reached {path}. Give one entry a row of the batch, in its "
            "order."
        )
    return repeats
