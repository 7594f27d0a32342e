"""What `KeyValue` and `Input` deltas of a site put in front of what is there: keys and values, and positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.delta import Input, KeyValue
from veneer.site import Rows, Site, put, take


def key_value(site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """k and v [batch, kv_heads, length, head_dim] as the active `KeyValue` deltas of this site leave them.

    The third is which row of the batch sees which of the positions that came in front, [batch, added]; None where all
    see all. A row that an adapter does not serve gets empty positions there, which it does not see.
    """
    seen: Tensor | None = None
    front = 0
    for delta, _, rows in site.deltas(KeyValue, k):
        if cast(KeyValue, delta).apart:
            continue
        if rows is None:
            wide_k, wide_v = delta(k, v)
        else:
            wide_k, wide_v = delta(take(k, 0, rows), take(v, 0, rows))
        added = wide_k.shape[2] - k.shape[2]
        if rows is not None:
            wide_k = put(F.pad(k, (0, 0, added, 0)), 0, rows, wide_k)
            wide_v = put(F.pad(v, (0, 0, added, 0)), 0, rows, wide_v)
        if rows is not None or seen is not None:
            before = k.new_ones(len(k), front, dtype=torch.bool) if seen is None else seen
            served = k.new_full((len(k), added), rows is None, dtype=torch.bool)
            if rows is not None:
                served = put(served, 0, rows, served.new_ones(len(rows), added))
            seen = torch.cat([served, before], dim=1)
        k, v, front = wide_k, wide_v, front + added
    return k, v, seen


def apart(site: Site, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Keys and values to attend to apart, with the rows of the batch that do (None: all)."""
    for delta, _, rows in site.deltas(KeyValue, k):
        if not cast(KeyValue, delta).apart:
            continue
        if rows is None:
            yield (*delta(k, v), None)
        else:
            yield (*delta(take(k, 0, rows), take(v, 0, rows)), torch.tensor(rows, device=k.device))


def slots(site: Site, batch: Tensor) -> list[tuple[int, Rows]]:
    """How many positions each active `Input` delta of this site puts in front of which rows, the foremost last."""
    acting = ((cast(Input, delta), rows) for delta, _, rows in site.deltas(Input, batch))
    return [(delta.slots, rows) for delta, rows in acting if delta.slots]


def in_front(site: Site, ids: Tensor | None, embeddings: Tensor) -> Tensor:
    """The embeddings with all that `slots` names in front of them; rows that a delta does not serve get zeros there."""
    for delta, _, rows in site.deltas(Input, embeddings):
        if not cast(Input, delta).slots:
            continue
        if rows is None:
            embeddings = delta(ids, embeddings)
        else:
            served = delta(None if ids is None else take(ids, 0, rows), take(embeddings, 0, rows))
            embeddings = put(F.pad(embeddings, (0, 0, cast(Input, delta).slots, 0)), 0, rows, served)
    return embeddings
