"""PEFT's OFT files: the skew-symmetric entries of each module, `oft_R.weight`."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from veneer.delta import Method
from veneer.errors import FileError
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import Entry, NotInPEFT
from veneer.interop.peft.plain import Plain, single, transposed
from veneer.methods import OFT


class _OFT(Plain):
    METHODS: tuple[type[Method], ...] = (OFT,)
    fields = frozenset({"r", "oft_block_size", "block_share", "eps", "bias", "use_cayley_neumann"}) | frozenset(
        {"num_cayley_neumann_terms"}
    )
    known = ("oft_R.weight",)

    def endings(self, claim: Claim) -> dict[str, tuple[str, tuple[int, ...]]]:
        if claim.place.functional or type(claim.place.owner).__name__ == "Conv1D":
            raise NotInPEFT(f"PEFT has no OFT on {claim.place.path}")
        return {"skew": ("oft_R.weight", tuple(claim.delta.get_parameter("skew").shape))}

    def options(self, adapter: Adapter) -> dict[str, Any]:
        oft = single(adapter.claims, OFT)
        return {
            "bias": "none",
            "block_share": oft.block_share,
            "coft": False,
            "fan_in_fan_out": transposed(adapter, OFT),
            "module_dropout": 0.0,
            "num_cayley_neumann_terms": oft.num_cayley_neumann_terms or 5,
            "oft_block_size": oft.block_size,
            "peft_type": "OFT",
            "peft_version": "0.18.0",  # since which the series is this one; PEFT takes a file without it for older
            "r": 0,
            "use_cayley_neumann": oft.num_cayley_neumann_terms is not None,
        }

    def entries(self, model: nn.Module, config: dict[str, Any], modules: dict[str, set[str]], file: str) -> list[Entry]:
        if config.get("bias", "none") != "none" or not config.get("oft_block_size"):
            raise FileError(f"{file} has biases, or no oft_block_size, which Veneer does not read; merge it with PEFT.")
        version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
        if config.get("use_cayley_neumann", True) and (not version or (int(version[1]), int(version[2])) < (0, 18)):
            raise FileError(f"{file} was written before PEFT 0.18, which sums another series. Train it anew.")
        terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else None
        oft = OFT(config["oft_block_size"], config.get("block_share", False), terms)
        return [Entry(oft, "target_modules", [(path, None) for path in modules])]


KIND = _OFT()
