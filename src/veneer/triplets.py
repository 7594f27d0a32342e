"""Low-rank changes in the form of a singular value decomposition, and the budget of ranks that layers share.

A change s·B·diag(E)·A has one entry of E a rank; setting it to zero takes that rank away, and it may come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veneer import lowrank
from veneer.delta import PASSING, Place
from veneer.errors import MethodError


class Schedule(Protocol):
    """The options of AdaLoRA that say when the budget falls, and how importance is smoothed."""

    @property
    def total_steps(self) -> int: ...
    @property
    def target_rank(self) -> int: ...
    @property
    def warmup(self) -> int: ...
    @property
    def final(self) -> int: ...
    @property
    def interval(self) -> int: ...
    @property
    def beta_importance(self) -> float: ...
    @property
    def beta_uncertainty(self) -> float: ...


class Triplets(lowrank.Pair):
    """A [rank, in, *kernel] and B [out, rank, *1], nearly zero, with E [rank, 1], zero, between them."""

    fast = frozenset()

    def begin(self, place: Place, orthogonality: float) -> None:
        """Add what a plain pair does not have."""
        if place.format.rows:
            raise MethodError("AdaLoRA does not act on stacks of matrices. Leave this one out, or attach LoRA there.")
        self.orthogonality = orthogonality
        self.E = nn.Parameter(torch.zeros(self.rank, 1, **place.new))
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)

    def parts(self) -> Sequence[tuple[Tensor, Tensor, float]]:
        return ((self.A * self.E.view(-1, *[1] * (self.A.dim() - 1)), self.B, 1.0),)

    def regularization(self) -> Tensor | None:
        if not self.orthogonality:
            return None
        a, b = self.A.flatten(1), self.B.flatten(1)
        one = torch.eye(self.rank, dtype=a.dtype, device=a.device)
        norms = torch.linalg.norm(a @ a.T - one) + torch.linalg.norm(b.T @ b - one)
        term: Tensor = norms * (self.orthogonality / 2)
        return term

    def gathered(self, name: str) -> Tensor | None:
        """What training has gathered so far under a name."""
        return self._buffers.get(f"{PASSING}{name}")

    def gather(self, **tensors: Tensor) -> None:
        """Keep tensors for the next step, and for a training that goes on from a checkpoint."""
        for name, tensor in tensors.items():
            self.register_buffer(f"{PASSING}{name}", tensor)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        begun = f"{prefix}{PASSING}"
        found = {key.removeprefix(begun): tensor for key, tensor in state_dict.items() if key.startswith(begun)}
        self.gather(**{name: tensor.to(self.E.device) for name, tensor in found.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def observe_importance(self, beta_importance: float, beta_uncertainty: float) -> None:
        """Take in |w·g| of every entry w, with the gradient g that the last step was made from."""
        for name, w in self.named_parameters():
            seen = torch.zeros_like(w) if w.grad is None else (w * w.grad).abs()
            before = self.gathered(f"importance_{name}"), self.gathered(f"uncertainty_{name}")
            importance, uncertainty = (torch.zeros_like(w) if one is None else one for one in before)
            importance = beta_importance * importance + (1 - beta_importance) * seen
            uncertainty = beta_uncertainty * uncertainty + (1 - beta_uncertainty) * (seen - importance).abs()
            self.gather(**{f"importance_{name}": importance, f"uncertainty_{name}": uncertainty})

    def scores(self) -> Tensor:
        """Importance of each triplet."""
        state = {name.removeprefix(PASSING): buffer for name, buffer in self.named_buffers(recurse=False)}
        a, e, b = (state[f"importance_{name}"] * state[f"uncertainty_{name}"] for name in ("A", "E", "B"))
        return e.flatten() + a.flatten(1).mean(1) + b.flatten(1).mean(0)

    @torch.no_grad()
    def cut(self, kept: Tensor) -> None:
        """Set the other triplets' E to zero."""
        self.E.masked_fill_(~kept.unsqueeze(1), 0.0)


class Beside(Triplets, lowrank.Beside):
    """y + s·B(E·A(dropout(x)))."""

    def __init__(self, place: Place, rank: int, scale: float, orthogonality: float, dropout: float) -> None:
        lowrank.Beside.__init__(self, place, rank, scale, "kaiming", dropout)
        self.begin(place, orthogonality)


class Inside(Triplets, lowrank.Inside):
    """w + s·B·diag(E)·A."""

    def __init__(self, place: Place, rank: int, scale: float, orthogonality: float) -> None:
        lowrank.Inside.__init__(self, place, rank, scale, "kaiming")
        self.begin(place, orthogonality)


def budget(method: Schedule, total: int, layers: int, step: int) -> int:
    """How many of `total` triplets may stay after this step: all, then ever fewer, then the target."""
    target = method.target_rank * layers
    last = method.total_steps - method.final
    left = 1 - (min(max(step, method.warmup), last) - method.warmup) / (last - method.warmup)
    return int((total - target) * left**3 + target)


def allocate(method: Schedule, deltas: Sequence[Triplets], step: int) -> None:
    """One step of the schedule, over all the layers together."""
    last = method.total_steps - method.final
    kept = [delta.gathered("kept") for delta in deltas]
    if step >= last and all(one is not None for one in kept):
        for delta, one in zip(deltas, kept, strict=True):
            assert one is not None
            delta.cut(one)
        return
    if step < last or any(delta.gathered("importance_E") is None for delta in deltas):  # some training has seen none
        for delta in deltas:
            delta.observe_importance(method.beta_importance, method.beta_uncertainty)
    if step < last and (step <= method.warmup or step % method.interval):
        return
    scores = [delta.scores() for delta in deltas]
    together = torch.cat([score.to(scores[0].device) for score in scores])
    over = len(together) - budget(method, len(together), len(deltas), step)
    threshold = together.kthvalue(over).values.item() if over > 0 else -1.0
    for delta, score in zip(deltas, scores, strict=True):
        stays = score > threshold
        delta.cut(stays)
        if step >= last:
            delta.gather(kept=stays)
