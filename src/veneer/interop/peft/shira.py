"""PEFT's SHIRA files, which hold the random places beside the values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.handle import Claim
from veneer.interop.peft.table import Table, the_one
from veneer.methods import SHiRA


def _write(claims: Sequence[Claim]) -> dict[str, Any]:
    method: SHiRA = the_one(claims)
    return {"r": method.rank, "random_seed": method.seed, "mask_type": "random", "init_weights": True}


def _read(config: dict[str, Any]) -> SHiRA:
    return SHiRA(rank=config["r"], seed=config.get("random_seed"))


KIND = Table(
    METHODS=(SHiRA,),
    tensors={"values": "shira_weight", "indices": "shira_indices"},
    write=_write,
    read=_read,
    known=frozenset({"r", "random_seed", "mask_type", "init_weights"}),
    only={"bias": ("none",)},
    conv1d=False,
)
