"""PEFT's HIRA files, for linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.handle import Claim
from veneer.interop.peft.table import Table, is_conv1d, the_one
from veneer.methods import HiRA


def _write(claims: Sequence[Claim]) -> dict[str, Any]:
    method: HiRA = the_one(claims)
    fields = {"r": method.rank, "hira_dropout": method.dropout, "init_weights": True}
    return {**fields, "fan_in_fan_out": is_conv1d(claims)}


def _read(config: dict[str, Any]) -> HiRA:
    return HiRA(rank=config["r"], dropout=config.get("hira_dropout", 0.0))


KIND = Table(
    METHODS=(HiRA,),
    tensors={"A": "hira_A", "B": "hira_B"},
    write=_write,
    read=_read,
    known=frozenset({"r", "hira_dropout", "init_weights"}),
    only={"bias": ("none",)},
)
