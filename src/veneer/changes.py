"""What an adapter changes in a weight, ΔW: as two thin factors while it is known to be a product, dense otherwise.

The sum of products B_i·A_i is one product, of the B_i side by side and the A_i under each other. The sum of the factors
is not: (B_1 + B_2)·(A_1 + A_2) has the cross terms B_1·A_2 and B_2·A_1, which no adapter was trained for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.delta import Before, Delta, Place, Weight, compute_dtype, row_index
from veneer.errors import NotMergeable
from veneer.handle import Claim
from veneer.layers import Stack
from veneer.lowrank import Pair


@dataclass(frozen=True)
class Thin:
    """ΔW = B·A with B [..., out, rank] and A [..., rank, in]."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.B.shape[-1]


Change = Thin | Tensor


def dense(change: Change) -> Tensor:
    """ΔW [..., out, in]."""
    return change.B @ change.A if isinstance(change, Thin) else change


def scaled(change: Change, weight: float) -> Change:
    """weight · ΔW."""
    return Thin(change.B * weight, change.A) if isinstance(change, Thin) else change * weight


def total(changes: Sequence[Change]) -> Change:
    """The exact sum; thin, of the sum of the ranks, where every part is."""
    thin = [change for change in changes if isinstance(change, Thin)]
    if len(thin) == len(changes):
        return Thin(torch.cat([one.B for one in thin], -1), torch.cat([one.A for one in thin], -2))
    return torch.stack([dense(change) for change in changes]).sum(0)


def outwards(claims: Sequence[Claim]) -> list[Claim]:
    """An adapter's claims from the weight outwards; of those before the layer the last acts next to it."""
    inner = sorted((one for one in claims if depth(one.delta) < 2), key=lambda one: depth(one.delta))
    return inner + [one for one in reversed(claims) if depth(one.delta) == 2]


def depth(delta: Delta) -> int:
    """How far from the stored weight a delta acts: where it is read, on what it gives, on what it is given."""
    return 0 if isinstance(delta, Weight) else 2 if isinstance(delta, Before) else 1


@torch.no_grad()
def change(place: Place, claims: Sequence[Claim]) -> Change:
    """What these claims, all that one adapter has on this weight, change in it together. The place has its map."""
    if all(isinstance(one.delta, Pair) and type(one.delta).merge is Pair.merge for one in claims) and all(
        one.place.spans == place.spans for one in claims
    ):
        return total([_thin(place, one.delta) for one in claims if isinstance(one.delta, Pair)])
    before = place.read().to(torch.float64)  # so that the small difference of two large numbers keeps its digits
    after = before
    if any(one.method.unit == "parameter" for one in claims):
        stored = _whole(place, [one for one in claims if one.method.unit == "parameter"])
        after = place.format.logical(place.owner, stored)
    for one in outwards([one for one in claims if one.method.unit == "weight"]):
        if one.delta.measures and after is not before:
            raise NotMergeable(
                f"{place.path}: {type(one.method).__name__} measures the base's weight, which another method of this "
                "adapter changes first, so that both together are no change of the weight. Keep it attached."
            )
        after = _merged(one, after, place)
    return _matrix(place, after - before).to(compute_dtype(place.weight.dtype))


def whole(place: Place, claims: Sequence[Claim]) -> Tensor:
    """The parameter of this place as these claims leave it, in the dtype that adapters are kept in."""
    return _whole(place, claims).to(compute_dtype(place.weight.dtype))


@torch.no_grad()
def _whole(place: Place, claims: Sequence[Claim]) -> Tensor:
    value = place.weight.to(torch.float64)
    for one in sorted(claims, key=lambda one: one.method.unit != "parameter"):
        if one.method.unit == "parameter":
            value = one.delta.merge(value)
        else:  # it stands on the weight beside this bias
            rows = row_index(one.place.spans or ((0, len(value)),), value.device)
            value = value.index_copy(0, rows, one.delta.merge_bias(value[rows]))
    return value


def _merged(one: Claim, weight: Tensor, place: Place) -> Tensor:
    if one.place.spans == place.spans:
        return one.delta.merge(weight)
    assert one.place.spans is not None
    rows = row_index(one.place.spans, weight.device)
    dim = place.format.rows
    return weight.index_copy(dim, rows, one.delta.merge(weight.index_select(dim, rows)))


def _thin(place: Place, pair: Pair) -> Thin:
    return Thin(_matrix(place, pair.B.detach()) * pair.scale, _matrix(place, pair.A.detach()))


def _matrix(place: Place, tensor: Tensor) -> Tensor:
    """A weight or a factor of it as the matrix that its map takes it for; a stack of matrices stays one."""
    return tensor if isinstance(place.map, Stack) else tensor.flatten(1)


def truncated(change: Change, rank: int) -> tuple[Thin, float]:
    """The best approximation of at most this rank (Eckart and Young 1936), and its error ‖ΔW - B·A‖ / ‖ΔW‖.

    A has orthonormal rows and B the singular values, so that where ΔW has a smaller rank than asked the rest of A is
    not zero, as in a new LoRA, and can still be trained. A product that is thin enough already stays as it is.
    """
    if isinstance(change, Thin):
        if change.rank <= rank:
            return change, 0.0
        left, upper = torch.linalg.qr(change.B.to(compute_dtype(change.B.dtype)))
        right, lower = torch.linalg.qr(change.A.mT.to(left.dtype))
        u, s, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
        u, v = left @ u, v @ right.mT
    else:
        u, s, v = torch.linalg.svd(change, full_matrices=False)
    norm = float(s.norm())
    error = float(s[..., rank:].norm()) / norm if norm else 0.0
    return Thin(u[..., :rank] * s[..., None, :rank], v[..., :rank, :]), error


def largest(tensor: Tensor, density: float) -> Tensor:
    """The share `density` of the entries, the largest by magnitude; the others are zero."""
    flat = tensor.flatten()
    kept = flat.abs().topk(max(1, round(density * len(flat))), sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(tensor)


def ties(changes: Sequence[tuple[float, Tensor]], density: float) -> Tensor:
    """TIES: trim each to its largest entries, elect a sign for each entry by their sum, average those that have it."""
    trimmed = torch.stack([largest(tensor, density) * weight for weight, tensor in changes])
    agreeing = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def dare(changes: Sequence[tuple[float, Tensor]], density: float, generator: torch.Generator) -> Tensor:
    """DARE: keep a random share `density` of each one's entries, scaled by 1 / density, and add up."""
    summed = torch.zeros_like(changes[0][1])
    for weight, tensor in changes:
        kept = torch.rand(tensor.shape, generator=generator) < density  # on the CPU: the same on every machine
        summed += tensor * kept.to(tensor.device) * (weight / density)
    return summed
