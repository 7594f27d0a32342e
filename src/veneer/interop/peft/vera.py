"""PEFT's VERA files: two vectors of each module, and the shared A and B unless they are drawn again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from veneer.delta import Method
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import Entry, NotInPEFT, fill
from veneer.interop.peft.plain import Plain, single, transposed
from veneer.lowrank import Projections
from veneer.methods import VeRA


class _VeRA(Plain):
    METHODS: tuple[type[Method], ...] = (VeRA,)
    fields = frozenset({"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "bias"})
    known = ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B")

    def endings(self, claim: Claim) -> dict[str, tuple[str, tuple[int, ...]]]:
        assert isinstance(claim.method, VeRA)
        if claim.place.functional:
            raise NotInPEFT(f"PEFT has no VeRA on {claim.place.path}")
        return {
            "b": ("vera_lambda_b", (claim.place.shape[0],)),
            "d": ("vera_lambda_d", (claim.method.rank,)),
        }

    def to_tensors(self, claims: Sequence[Claim]) -> dict[str, Tensor]:
        tensors = super().to_tensors(claims)
        single(claims, VeRA)
        return tensors | {f"base_model.vera_{name}": tensor for name, tensor in _shared(claims).state_dict().items()}

    def from_tensors(self, claims: Sequence[Claim], tensors: dict[str, Tensor]) -> None:
        super().from_tensors(claims, tensors)
        for name, tensor in _shared(claims).state_dict(keep_vars=True).items():
            fill(tensor, tensors[f"base_model.vera_{name}"])

    def options(self, adapter: Adapter) -> dict[str, Any]:
        vera = single(adapter.claims, VeRA)
        return {
            "bias": "none",
            "d_initial": vera.d_initial,
            "fan_in_fan_out": transposed(adapter, VeRA),
            "peft_type": "VERA",
            "projection_prng_key": vera.seed,
            "r": vera.rank,
            "save_projection": vera.save_projection,
            "vera_dropout": vera.dropout,
        }

    def entries(self, model: nn.Module, config: dict[str, Any], modules: dict[str, set[str]], file: str) -> list[Entry]:
        if config.get("bias", "none") != "none":
            raise ValueError("it trains biases too, which Veneer's VeRA does not")
        vera = VeRA(
            rank=config["r"],
            d_initial=config.get("d_initial", 0.1),
            dropout=config.get("vera_dropout", 0.0),
            seed=config.get("projection_prng_key", 0),
            save_projection=config.get("save_projection", True),
        )
        return [Entry(vera, "target_modules", [(path, None) for path in modules])]


def _shared(claims: Sequence[Claim]) -> Projections:
    found = {id(claim.place.shared): claim.place.shared for claim in claims if claim.place.shared is not None}
    if len(found) > 1:
        raise NotInPEFT("PEFT has one shared A and B an adapter")
    (shared,) = found.values()
    assert isinstance(shared, Projections)
    return shared


KIND = _VeRA()
