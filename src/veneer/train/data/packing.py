"""Several examples in one row, none of which sees another.

Each example's positions start again at 0, and there is no attention mask: from such positions transformers makes masks
that keep the examples apart (Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021,
arXiv:2107.02027). It does so only without a cache, and says nothing where it does not: `use_cache=False` is part of the
batch, and `check_packing` tries a model before it is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import DataError
from veneer.train.labels import IGNORED

OPEN = 64
"""Rows that are filled at the same time: each example goes into the fullest where it fits."""

Columns = dict[str, Any]


def pack(examples: Iterable[Columns], max_length: int) -> Iterator[Columns]:
    """Rows of at most `max_length` tokens: input_ids, labels, position_ids, length. The same order, the same rows."""
    open_: list[Columns] = []
    for example in examples:
        size = len(example["input_ids"])
        fitting = [row for row in open_ if row["length"] + size <= max_length]
        if fitting:
            row = max(fitting, key=lambda row: int(row["length"]))
        else:
            if len(open_) == OPEN:
                fullest = max(range(OPEN), key=lambda number: int(open_[number]["length"]))
                yield open_.pop(fullest)
            row = {"input_ids": [], "labels": [], "position_ids": [], "length": 0}
            open_.append(row)
        row["input_ids"] += example["input_ids"]
        row["labels"] += [IGNORED, *example["labels"][1:]]  # or the example before would be taught to predict it
        row["position_ids"] += range(size)
        row["length"] += size
    yield from open_


def check_packing(model: nn.Module) -> None:
    """DataError where a model, with what is attached to it, lets packed examples see each other.

    Three short examples are put through it in one row and each alone; what that changes in all but the first must be
    small beside what comes of one row without any borders.
    """
    name, was_training = type(model).__name__, model.training
    device = next(model.parameters()).device
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    numbers = torch.Generator().manual_seed(0)
    alone = [torch.randint(table.weight.shape[0], (1, size), generator=numbers).to(device) for size in (7, 4, 6)]
    row = torch.cat(alone, dim=1)
    positions = torch.cat([torch.arange(ids.shape[1], device=device) for ids in alone])[None]
    model.eval()
    try:
        with torch.no_grad():
            apart = torch.cat([_logits(model, input_ids=ids) for ids in alone], dim=1)
            packed = _logits(model, input_ids=row, position_ids=positions)
            mixed = _logits(model, input_ids=row, position_ids=positions, attention_mask=torch.ones_like(row))
    except TypeError as wrong:
        raise DataError(f"{name} cannot take packed examples: {wrong}. Set data.packing: false.") from wrong
    finally:
        model.train(was_training)
    # the median token: in bfloat16, rounding alone can send a token elsewhere, as a new prefix on SmolLM2 does
    error, border = (
        float((found - apart)[0, alone[0].shape[1] :].abs().amax(dim=-1).median()) for found in (packed, mixed)
    )
    if error > 0.2 * border + 1e-6 * float(apart.abs().max()):
        raise DataError(
            f"{name} lets packed examples see each other: logits are off by {error:.2g}, without borders by "
            f"{border:.2g}. Set data.packing: false, or load it with attn_implementation='sdpa'. A trained prompt in "
            "front of a row serves its first example only; prefixes are in front of each."
        )


def _logits(model: nn.Module, **batch: Tensor) -> Tensor:
    found: Tensor = model(**batch, use_cache=False).logits
    return found.double()
