"""AdaLoRA: low-rank changes that share one budget of ranks, given to the weights that need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from veneer.delta import Delta, Method, Place
from veneer.errors import MethodError
from veneer.triplets import Beside, Inside, Triplets, allocate

Steps = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class AdaLoRA(Method):
    """Adaptive low-rank adaptation: singular triplets, of which training keeps the most important ones of all layers.

    Formula:
        W' = W + alpha / (initial_rank + 1e-5) · P·diag(Λ)·Q; the loss gets orthogonality · mean(‖PᵀP - I‖, ‖QQᵀ - I‖)
        over all P and Q. A triplet's importance is that of its Λ plus the means over its P and its Q, where an
        entry w with gradient g has I·U: I = smoothed |w·g|, U = smoothed | |w·g| - I |. The budget falls as a cubic
        from initial_rank to target_rank a layer; where it is cut, the least important Λ are set to zero.

    Shapes:
        Q [rank, in], Λ [rank, 1], P [out, rank], called A, E, B; a convolution's Q is [rank, in, *kernel].

    Defaults:
        initial_rank: triplets of each layer at the start.
        target_rank: triplets of each layer at the end, on average.
        alpha: numerator of the scale.
        total_steps: optimizer steps of the whole training, which the schedule spans.
        warmup: first steps, in which nothing is cut.
        final: last steps, in which the cut stays as it is.
        interval: steps between two cuts.
        beta_importance: decay of the importance.
        beta_uncertainty: decay of its uncertainty.
        orthogonality: weight of the term in the loss.
        dropout: probability of dropping an input of Q while training.
        rank_pattern: other numbers of triplets, by glob or `re:` regex over module paths; the scale stays.

    Cost:
        rank · (in + out + 1) parameters a layer, twice their memory in training; see `veneer.train.AdapterCallback`.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        MethodError for a value out of range, a schedule that cuts nothing, a pattern that matches nothing, a stack of
        matrices, or dropout on a weight that is read functionally.

    Paper:
        Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, arXiv:2303.10512; the
        scale and the mean of norms are those of its authors' code.
    Example:
        veneer.attach(model, veneer.AdaLoRA(total_steps=1000, warmup=100, final=300, interval=10))
    """

    total_steps: Annotated[int, Field(ge=1)]
    initial_rank: Annotated[int, Field(ge=1)] = 12
    target_rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(allow_inf_nan=False)] = 16.0
    warmup: Steps = 0
    final: Steps = 0
    interval: Annotated[int, Field(ge=1)] = 1
    beta_importance: Decay = 0.85
    beta_uncertainty: Decay = 0.85
    orthogonality: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rank_pattern: Mapping[str, Steps] = field(default_factory=dict)
    learning_rate: ClassVar[float] = 5e-3

    def build(self, place: Place) -> Delta:
        rank = place.choose(self.rank_pattern, self.initial_rank)
        sizes = place, rank, self.alpha / (self.initial_rank + 1e-5), self.orthogonality
        if not place.functional:
            return Beside(*sizes, self.dropout)
        if self.dropout:
            raise MethodError("The weight is read without a call that AdaLoRA could drop inputs of. Set dropout=0.0.")
        return Inside(*sizes)

    def check(self, places: Sequence[Place]) -> None:
        if self.warmup + self.final >= self.total_steps or self.target_rank > self.initial_rank:
            raise MethodError(f"{self} cuts nothing: warmup + final < total_steps and target_rank <= initial_rank.")
        for pattern in self.rank_pattern:
            if not any(place.matches(pattern) for place in places):
                raise MethodError(f"The pattern '{pattern}' matches none of AdaLoRA's {len(places)} places.")

    def penalty(self, deltas: Sequence[Delta]) -> Tensor | None:
        term = super().penalty(deltas)
        return None if term is None else term / len(deltas)

    def after_step(self, deltas: Sequence[Delta], step: int) -> None:
        allocate(self, [delta for delta in deltas if isinstance(delta, Triplets)], step)
