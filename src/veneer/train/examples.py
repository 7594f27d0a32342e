"""A prompt and its answer, as the conversation that it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from veneer.errors import TemplateError
from veneer.train.data.chat import Template, plain_ids
from veneer.train.data.kinds import Message
from veneer.train.labels import Encoded


@dataclass(frozen=True, slots=True)
class Example:
    """What the user says and what the assistant should answer, under an optional system message."""

    prompt: str
    answer: str
    system: str = ""

    def question(self) -> list[dict[str, str]]:
        """The chat up to the user's turn."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """The token ids after which the model should write the answer."""
    return encode_turns(tokenizer, example.question())


def encode_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> list[int]:
    """The token ids after which the model should write its answer to the last of several turns."""
    [ids] = plain_ids(tokenizer, [_template(tokenizer).render(turns, None, open_answer=True)])
    return ids


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> Encoded:
    """The token ids of prompt and answer, up to the end of the assistant's turn, and labels on the answer alone."""
    if not example.answer.strip():
        raise TemplateError(f"The answer to {example.prompt[:40]!r} is empty, so nothing is learned. Drop the example.")
    messages = [*example.question(), {"role": "assistant", "content": example.answer}]
    [(encoded, _)] = _template(tokenizer).encoded(messages, None, all_tokens=False)
    return encoded


def _template(tokenizer: PreTrainedTokenizerBase) -> Template:
    if not tokenizer.chat_template:
        raise TemplateError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template. "
            "Set tokenizer.chat_template, or take the instruction-tuned model."
        )
    return _kept(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=4)
def _kept(tokenizer: PreTrainedTokenizerBase, template: str) -> Template:
    """A template is tried on a few conversations when it is made, which need not be done for each example."""
    return Template(tokenizer)
