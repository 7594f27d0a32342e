"""Trainable tokens: chosen rows of the token embedding are trained, wherever they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from veneer.delta import After, Delta, Method, Place, Unit
from veneer.errors import MethodError


class _Rows(After):
    """V [tokens, width], which starts as the rows of W; a lookup and a tied head both see V - W added to them."""

    mergeable = True
    additive = True
    linear = True
    tokens: Tensor
    slots: Tensor
    original: Tensor

    def __init__(self, place: Place, tokens: Sequence[int]) -> None:
        super().__init__()
        rows = torch.tensor(tokens, device=place.weight.device)
        slots = torch.full(place.shape[1:], len(tokens), device=rows.device)
        slots[rows] = torch.arange(len(tokens), device=rows.device)
        original = place.read().T[rows].to(place.new["dtype"])
        for name, buffer in {"tokens": rows, "slots": slots, "original": original}.items():
            self.register_buffer(name, buffer, persistent=False)
        self.value = nn.Parameter(original.clone())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        change = (self.value - self.original).to(y.dtype)
        if x.is_floating_point():  # the head
            return y.index_add(-1, self.tokens, F.linear(x.to(y.dtype), change))
        return y + F.embedding(self.slots[x], F.pad(change, (0, 0, 0, 1)))

    def merge(self, weight: Tensor) -> Tensor:
        return weight.index_add(1, self.tokens, (self.value - self.original).T.to(weight.dtype))


@dataclass(frozen=True)
class TrainableTokens(Method):
    """Trainable tokens: chosen rows of the token embedding are trained, and a head tied to it follows.

    Formula:
        W'[t] = V[t] for the chosen tokens t, where V starts as W[t]; all other rows stay.

    Shapes:
        V [tokens, width].

    Defaults:
        tokens: the ids of the tokens to train, such as those newly added to the vocabulary.

    Cost:
        width parameters a token: 40,960 for ten tokens of width 4096. W is not copied. None once merged.

    Merging:
        V is stored in its rows, rounded once to the dtype of the weight; a tied head follows.

    Errors:
        MethodError for no token, one named twice or outside the vocabulary, or an embedding that scales its rows.

    Paper:
        Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, arXiv:2104.08691, trains
        embeddings of new tokens in the same way, in front of the input only.
    Example:
        veneer.attach(model, veneer.TrainableTokens(tokens=[50257, 50258]))
    """

    tokens: Sequence[Annotated[int, Field(ge=0)]]
    unit: ClassVar[Unit] = "table"
    default_where: ClassVar[str] = "embedding"
    learning_rate: ClassVar[float] = 2e-3

    def build(self, place: Place) -> Delta:
        if not self.tokens or len({*self.tokens}) < len(self.tokens):
            raise MethodError(f"tokens={list(self.tokens)} is empty or names one twice. Name each token once.")
        if max(self.tokens) >= place.shape[1]:
            raise MethodError(
                f"token {max(self.tokens)} is outside the vocabulary of {place.shape[1]}. Resize it first."
            )
        for other in place.tied:
            other.format.map(other.reader)
            if other.functional:
                raise MethodError(f"{other.path} shares the weight and reads it without a call. Untie them first.")
        return _Rows(place, self.tokens)
