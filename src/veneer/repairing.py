"""Quantizing a base around the adapter that will be trained on it, so that the two together lose less.

Rounding W to few bits leaves an error, of which a low-rank pair can take the main part. LoftQ alternates: Q is
W - s·B·A in few bits, then s·B·A is the best pair for W - Q. QPiSSA begins with the main directions of W itself, whose
large values then need no rounding at all. Either way the base becomes Q, which is not W in few bits: it belongs to this
adapter, and has to be kept with it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from rich.progress import track
from torch import Tensor, nn

from veneer import pairs, places
from veneer.adapter import attach
from veneer.errors import MethodError
from veneer.handle import Adapter, adapters
from veneer.lowrank import Pair
from veneer.methods import LoRA
from veneer.ops import nf4_kernels
from veneer.quantizing import NF4, chosen, quantize

STARTS = ("loftq", *pairs.POWERS)


@dataclass(frozen=True)
class Repair:
    """By path, the error ‖W - Ŵ‖ / ‖W‖ of a weight in few bits alone (`before`) and with its pair (`after`)."""

    before: dict[str, float]
    after: dict[str, float]

    def __str__(self) -> str:
        before, after = fmean(self.before.values()), fmean(self.after.values())
        return f"mean error of {len(self.before)} weights: {before:.4f} in few bits alone, {after:.4f} with the adapter"


@torch.no_grad()
def quantize_around(
    model: nn.Module,
    quantizer: NF4,
    method: LoRA,
    where: str | None = None,
    *,
    alternations: int = 1,
    skip: Sequence[str] = (),
    name: str = "default",
) -> tuple[Adapter, Repair]:
    """Quantize the dense linears of a model in place, and attach LoRA so that it starts with what that takes from them.

    `method.init` says how the first Q is made: with "loftq" from W, with "pissa" from W less its main directions. Each
    of the `alternations` then fits the pair to W - Q, and each further one first makes Q anew from what the pair
    leaves. The adapter is a plain LoRA; linears that it does not stand on are stored as `quantize` stores them.

    Papers: LoftQ, Li et al., ICLR 2024, arXiv:2310.08659; PiSSA, Meng et al., NeurIPS 2024, arXiv:2404.02948.

    Raises MethodError, before anything is changed, for another `init`, a rank above a weight's, or no alternation, and
    what `quantize` and `attach` raise.
    """
    if method.init not in STARTS:
        raise MethodError(f"init='{method.init}' repairs nothing. Use one of {', '.join(STARTS)}.")
    if alternations < 1:
        raise MethodError(f"alternations={alternations}: give at least 1.")
    places.check_name(model, name, list(adapters(model)))
    plain = dataclasses.replace(method, init="kaiming")
    stored = {place.path: place for place in chosen(model, "linear", skip)}
    started: dict[str, Pair] = {}
    for place in places.find(model, where or method.default_where, "weight"):
        if place.path in stored:
            pair = plain.build(dataclasses.replace(place, map=place.format.map(place.reader)))
            assert isinstance(pair, Pair)
            if pair.rank > min(place.shape):
                raise MethodError(f"{place.path} has {min(place.shape)} directions, not rank={pair.rank}.")
            started[place.path] = pair
    repair = Repair({}, {})
    for path, pair in track(started.items(), "Quantizing", disable=not sys.stderr.isatty()):
        place = stored[path]
        W, dtype = place.read().to(pair.A), place.weight.dtype
        repair.before[path] = _error(W, _few_bits(W, quantizer, dtype))
        if method.init != "loftq":
            pairs.start(pair, W, method.init)  # B is zero otherwise
        for _ in range(alternations):
            left = W - pair.scale * pair.B @ pair.A
            Q = _few_bits(left, quantizer, dtype)
            pairs.start(pair, W - Q, "pissa")
        repair.after[path] = _error(W, Q + pair.scale * pair.B @ pair.A)
        place.write(left)
    quantize(model, quantizer, skip=skip)
    adapter = attach(model, plain, where, name=name)
    for claim in adapter.claims:
        if claim.place.path in started:
            claim.delta.load_state_dict(started[claim.place.path].state_dict())
    return adapter, repair


def _few_bits(weight: Tensor, quantizer: NF4, dtype: torch.dtype) -> Tensor:
    """What is left of a weight that is stored in `dtype` and then in few bits."""
    packed = nf4_kernels.quantize(weight.to(dtype), quantizer.block_size, quantizer.double_quant)
    return nf4_kernels.dequantize(packed, weight.dtype)


def _error(weight: Tensor, other: Tensor) -> float:
    return float((weight - other).norm() / weight.norm())
