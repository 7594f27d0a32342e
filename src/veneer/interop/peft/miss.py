"""PEFT's MISS files; its `bat` multiplies by the weight, which Veneer's MiSS does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.handle import Claim
from veneer.interop.peft.table import Table, the_one
from veneer.methods import MiSS


def _write(claims: Sequence[Claim]) -> dict[str, Any]:
    method: MiSS = the_one(claims)
    mini = {"mini_r": method.mini_rank or 1, "init_weights": "mini" if method.mini_rank else True}
    return {"r": method.rank, "miss_dropout": method.dropout, "bias": "none", **mini}


def _read(config: dict[str, Any]) -> MiSS:
    mini = config["mini_r"] if config.get("init_weights") == "mini" else None
    return MiSS(rank=config["r"], mini_rank=mini, dropout=config.get("miss_dropout", 0.0))


KIND = Table(
    METHODS=(MiSS,),
    tensors={"D": "miss_block"},
    write=_write,
    read=_read,
    known=frozenset({"r", "mini_r", "miss_dropout"}),
    only={"bias": ("none",), "init_weights": (True, False, "mini")},
    conv1d=False,
)
