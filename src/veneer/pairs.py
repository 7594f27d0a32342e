"""Starts of a low-rank pair that are made from the weight, what quantizing took from it, or the inputs it gets.

Where a start is no zero change (PiSSA, OLoRA), its product s·B0·A0 is subtracted for good, as two further tensors that
are saved and never trained: the change is s·(B·A - B0·A0). Trained so, A and B move exactly as they do where the
product is taken out of the weight beforehand, and the weight stays what it was. It is a plain LoRA of twice the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer import lowrank
from veneer.delta import Place
from veneer.errors import AdapterError, MethodError

PLAIN = ("kaiming", "gaussian", "orthogonal")
POWERS = {"pissa": 0, "pissa_niter_16": 16}
"""Power iterations of the randomized SVD; none is the exact one."""


def deltas(
    init: str, beside: type[lowrank.Beside], inside: type[lowrank.Inside]
) -> tuple[type[lowrank.Beside], type[lowrank.Inside]]:
    """A method's two forms of the pair (beside a layer, inside its weight); plain LoRA's start as `init` says."""
    if init in PLAIN:
        return beside, inside
    if beside is not lowrank.Beside:
        raise MethodError(f"init='{init}' starts plain LoRA only. Use one of {', '.join(PLAIN)} here.")
    if init == "eva":
        return BesideInputs, InsideInputs
    return (BesideLoss, InsideLoss) if init == "loftq" else (BesideWeight, InsideWeight)


class FromWeight(lowrank.Pair):
    """A and B start as factors of the weight, A0 and B0 keep that start."""

    def __init__(self, place: Place, rank: int, scale: float, init: str, *dropout: Any) -> None:
        super().__init__(place, rank, scale, "kaiming", *dropout)
        if not place.filled and not self.A.is_meta:
            start(self, place.read(), init)
        self.A0: Tensor
        self.B0: Tensor
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def parts(self) -> Sequence[tuple[Tensor, Tensor, float]]:
        return (self.A, self.B, 1.0), (self.A0, self.B0, -1.0)


class BesideWeight(FromWeight, lowrank.Beside):
    """y + s·(B·A - B0·A0)·dropout(x)."""


class InsideWeight(FromWeight, lowrank.Inside):
    """w + s·(B·A - B0·A0)."""


def factors(W: Tensor, rank: int, scale: float, init: str) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of the start."""
    if rank > min(W.shape):
        raise MethodError(
            f"init='{init}' has {min(W.shape)} directions of this weight, not rank={rank}. Lower the rank."
        )
    if init == "olora":
        Q, R = torch.linalg.qr(W)
        return R[:rank], Q[:, :rank]
    if scale <= 0:
        raise MethodError(f"init='{init}' divides by the scale, which is {scale}. Set alpha above 0.")
    if POWERS[init]:
        U, S, V = torch.svd_lowrank(W, q=rank, niter=POWERS[init])
    else:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, V = U[:, :rank], S[:rank], Vh[:rank].T
    root = (S / scale).sqrt()
    return root.unsqueeze(1) * V.T, U * root


def start(pair: lowrank.Pair, weight: Tensor, init: str) -> None:
    """Set A and B to the start's factors of a weight, or of each matrix of a stack."""
    whole = pair.map.matrices(weight.to(pair.A))
    for W, A, B in zip(whole, pair.map.matrices(pair.A.data), pair.map.matrices(pair.B.data), strict=True):
        first, second = factors(W.flatten(1), pair.rank, pair.scale, init)
        A.copy_(first.view_as(A))
        B.copy_(second.view_as(B))


class Waiting(lowrank.Pair):
    """A pair that cannot act before it has seen what its start is made from."""

    def parts(self) -> Sequence[tuple[Tensor, Tensor, float]]:
        if self.waits:
            what = "batches" if self.waits == "inputs" else "dense_model"
            raise AdapterError(f"LoRA has not started yet. Call veneer.calibrate(model, adapter, {what}) first.")
        return super().parts()


class BesideInputs(Waiting, lowrank.Beside):
    """y + s·B·A·dropout(x), where A starts as the main directions of the inputs; B is zero."""

    def __init__(self, place: Place, rank: int, scale: float, init: str, dropout: float) -> None:
        super().__init__(place, rank, scale, "kaiming", dropout)
        if len(place.shape) != 2 or isinstance(place.owner, nn.Embedding):
            raise MethodError("init='eva' needs a linear layer's activations. Use another init, or another `where`.")
        if rank > place.shape[1]:
            raise MethodError(f"init='eva' has {place.shape[1]} directions of the inputs, not {rank}. Lower the rank.")
        self.waits = "" if place.filled else "inputs"
        self.seen = 0
        self.directions: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).to(self.A.dtype)
        self.seen += len(rows)
        known = rows if self.directions is None else torch.cat([self.directions, rows])
        _, S, Vh = torch.linalg.svd(known, full_matrices=False)
        self.directions = S[: self.rank].unsqueeze(1) * Vh[: self.rank]

    def settle(self) -> None:
        known = 0 if self.directions is None else int((self.directions.norm(dim=1) > 0).sum())
        if self.directions is None or known < self.rank:
            raise AdapterError(
                f"saw {self.seen} inputs with {known} directions among them, fewer than rank={self.rank}. Calibrate "
                "with more batches, and on code that calls this layer."
            )
        self.A.data.copy_(self.directions / self.directions.norm(dim=1, keepdim=True))
        self.directions, self.waits = None, ""


class InsideInputs(lowrank.Inside):
    """Refused: such a weight is read without a call whose inputs could be seen."""

    def __init__(self, place: Place, rank: int, scale: float, init: str) -> None:
        raise MethodError("init='eva' needs inputs, and this weight is read without a call. Use another init there.")


class Loss(Waiting):
    """s·B·A starts as the main part of what quantizing took from the weight: the first step of LoftQ's alternation.

    Its further steps would quantize W - s·B·A anew, and so need a base of their own for each adapter.
    """

    def __init__(self, place: Place, rank: int, scale: float, init: str, *dropout: Any) -> None:
        super().__init__(place, rank, scale, "kaiming", *dropout)
        stored = place.weight.dtype
        if stored.is_floating_point and not place.format.quantized and not place.filled:
            raise MethodError(
                f"init='loftq' makes up for what quantizing lost, and this weight is stored as {stored}. Quantize the "
                "base first and show veneer.calibrate the dense one, or use init='pissa'."
            )
        self.place = place
        self.waits = "" if place.filled else "weight"

    def observe(self, x: Tensor) -> None:
        start(self, x.to(self.A) - self.place.read().to(self.A), "pissa")
        self.waits = ""


class BesideLoss(Loss, lowrank.Beside):
    """y + s·B·A·dropout(x)."""


class InsideLoss(Loss, lowrank.Inside):
    """w + s·B·A."""
