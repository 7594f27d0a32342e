"""Held-out examples that a model is judged by, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from veneer.samples.smollm2 import Chat
from veneer.train.batch import Collator
from veneer.train.evaluate import answer_logits, chrf, held_out_loss, write
from veneer.train.examples import Example, encode, encode_prompt


@dataclass(frozen=True)
class Judgement:
    """How well a model does: its loss, the chrF of its answers, and these."""

    loss: float
    chrf: float
    answers: list[str]


class Judge:
    """Puts the same held-out examples to a model each time it is asked."""

    def __init__(self, chat: Chat, examples: Sequence[Example], max_new_tokens: int) -> None:
        self.tokenizer = chat.tokenizer
        self.collator = Collator.of(chat.model, chat.tokenizer)
        self.examples = tuple(examples)
        self.rows = [encode(chat.tokenizer, example) for example in examples]
        self.max_new_tokens = max_new_tokens

    def __call__(self, model: PreTrainedModel) -> Judgement:
        """Loss and chrF on all examples."""
        answers = self.answers(model, len(self.examples))
        score = chrf(answers, [example.answer for example in self.examples])
        return Judgement(self.loss(model), score, answers)

    def loss(self, model: PreTrainedModel) -> float:
        """The loss on all examples."""
        return held_out_loss(model, self.rows, self.collator)

    def answers(self, model: PreTrainedModel, first: int) -> list[str]:
        """What the model answers to the first examples."""
        prompts = [encode_prompt(self.tokenizer, example) for example in self.examples[:first]]
        return write(model, self.tokenizer, prompts, max_new_tokens=self.max_new_tokens, batch_size=50)

    def logits(self, model: PreTrainedModel, first: int) -> Tensor:
        """What predicts the answers to the first examples (token, vocabulary), in float32 on the CPU."""
        return answer_logits(model, self.rows[:first], self.collator)[0].float().cpu()

    def copying(self) -> float:
        """The chrF of answering with the prompt itself: what a rewriter must beat."""
        return chrf([example.prompt for example in self.examples], [example.answer for example in self.examples])
