"""Prompt tuning: trained embeddings in front of those of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from veneer.delta import Delta, Method, Place, Unit
from veneer.errors import MethodError
from veneer.prompts import Plain, check_stack


@dataclass(frozen=True)
class PromptTuning(Method):
    """A soft prompt: trained embeddings that the model reads as tokens in front of its own.

    Formula:
        X' = [P; X]; what the model computes at the positions of P is read by its attentions only, never returned.

    Shapes:
        P [length, width of the embedding].

    Defaults:
        length: tokens in front.
        init: "vocabulary" (embeddings of random tokens), "random" (uniform within 0.5), or token ids, such as
            `tokenizer(text)["input_ids"]`, which are repeated or cut to `length`.

    Cost:
        length · width parameters: 81,920 for length 20 and width 4096. Every forward reads `length` more tokens, which
        count in the model's longest context and stay in the cache.

    Merging:
        Not possible: it acts on activations.

    Errors:
        MethodError for an id outside the vocabulary, or an embedding that nothing can be put in front of.

    Paper:
        Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, arXiv:2104.08691.
    Example:
        veneer.attach(model, veneer.PromptTuning(length=20))
    """

    length: Annotated[int, Field(ge=1)] = 20
    init: Literal["vocabulary", "random"] | Sequence[Annotated[int, Field(ge=0)]] = "vocabulary"
    unit: ClassVar[Unit] = "input"
    default_where: ClassVar[str] = "input"
    learning_rate: ClassVar[float] = 5e-3

    def build(self, place: Place) -> Delta:
        check_stack(place)
        return Plain(self._start(place))

    @torch.no_grad()
    def _start(self, place: Place) -> Tensor:
        width, vocabulary = place.shape
        if self.init == "random":
            return torch.rand(self.length, width, **place.new) - 0.5
        if self.init == "vocabulary":
            ids = torch.randint(vocabulary, (self.length,), device=place.weight.device)
        else:
            ids = self._ids(vocabulary).to(place.weight.device)
        # as the model embeds them: some tables scale what they hold
        return place.owner(ids).to(**place.new, copy=True)  # type: ignore[no-any-return]

    def _ids(self, vocabulary: int) -> Tensor:
        ids = [i for i in self.init if isinstance(i, int)]
        if not ids or max(ids) >= vocabulary:
            raise MethodError(f"init={self.init!r} is no list of token ids below {vocabulary}.")
        return torch.tensor(ids).repeat(-(-self.length // len(ids)))[: self.length]
