"""Learned positions: the table that holds them, and how a prefix lets the base's tokens start further on in it.

While the table is called, its weight is shadowed by its later rows, so that whatever index the model computes, from a
mask or a cache, means the position `by` further on; an index past the end is torch's own IndexError.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import nn
from torch.utils.hooks import RemovableHandle

from veneer import site
from veneer.delta import KeyValue, Source, Weight
from veneer.errors import RoutingError
from veneer.seams import transformers


def sources(model: Any, tables: Iterable[str]) -> dict[str, Source]:
    """The table of learned positions of a model that is one stack and has one; `tables` are those of tokens."""
    count = transformers.positions(model.config) if transformers.is_pretrained(model) else None
    if count is None or model.config.is_encoder_decoder or transformers.rotates(model):
        return {}
    found = [
        (path, module)
        for path, module in site.base_modules(model)
        if isinstance(module, nn.Embedding) and module.num_embeddings >= count and path not in tables
    ]
    return {"positions": Source(*found[0], 0)} if len(found) == 1 else {}


def hooks(here: site.Site) -> list[RemovableHandle]:
    """Hooks on the table that the `KeyValue` deltas of this site move the tokens along."""
    tables = {binding.sources["positions"].module for _, binding, _ in _moving(here)}
    return [
        handle
        for table in tables
        for handle in (
            table.register_forward_pre_hook(functools.partial(_move, here=here)),
            table.register_forward_hook(_back, always_call=True),
        )
    ]


def _moving(here: site.Site) -> Iterator[tuple[str, site.Binding, int]]:
    """The deltas of a site that move tokens: whose, where, and by how much."""
    for name, bindings in here.bindings.items():
        for delta, binding in zip(cast(nn.ModuleList, here[name]), bindings, strict=True):
            if isinstance(delta, KeyValue) and delta.position_offset:
                yield name, binding, delta.position_offset


def _move(table: nn.Module, args: Any, here: site.Site) -> None:
    by, rows = 0, here.routes.rows
    for name, binding, offset in _moving(here):
        if not here.routes.serves(name, binding.path):
            continue
        if rows is not None and not all(name in row for row in rows):
            raise RoutingError(
                f"The prefix of '{name}' moves the positions of the tokens, which all rows of a batch share, so rows "
                "cannot differ in it. Run the rows apart."
            )
        by += offset
    own = site.of(table)
    if by and own is not None and any(True for _ in own.deltas(Weight, None)):
        raise RoutingError(
            "An adapter changes the table of positions that a prefix with position_offset moves along. Use one of the "
            "two at a time."
        )
    if by:
        table.__dict__["weight"] = table._parameters["weight"][by:]  # type: ignore[index]


def _back(table: nn.Module, args: Any, output: Any) -> None:
    table.__dict__.pop("weight", None)
