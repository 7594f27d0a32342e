"""A prompt and its answer as token ids, with a label on every token of the answer and on no other.

Which tokens belong to the answer is not searched for. The chat template is rendered twice, up to where the assistant
begins and with the answer in place; what the second has beyond the first is the answer and the end of its turn. That
holds for every template whose first rendering is a prefix of the second, and any other template is refused: a mask
that is off by one token trains a model that never stops, and nothing but the text would show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from veneer.errors import TemplateError

IGNORED = -100
"""The label of a token that adds nothing to the loss."""


class Encoded(TypedDict):
    """One example as the collator takes it; both lists have the same length."""

    input_ids: list[int]
    labels: list[int]


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
    return _ids(tokenizer, _render(tokenizer, example.question(), open_answer=True))


def encode_turns(tokenizer: PreTrainedTokenizerBase, chat: Sequence[dict[str, str]]) -> list[int]:
    """The token ids after which the model should write its answer to the last of several turns."""
    return _ids(tokenizer, _render(tokenizer, chat, open_answer=True))


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> Encoded:
    """The token ids of prompt and answer, up to the end of the assistant's turn, and their labels."""
    opening = _render(tokenizer, example.question(), open_answer=True)
    answer = {"role": "assistant", "content": example.answer}
    whole = _render(tokenizer, [*example.question(), answer], open_answer=False)
    if not whole.startswith(opening):
        raise TemplateError(
            f"The chat template of {tokenizer.name_or_path} renders a prompt that is not the beginning of the whole "
            f"chat: {_tail(opening)} came before the answer. Use a template with a generation prompt."
        )
    prompt, both = _ids(tokenizer, opening), _ids(tokenizer, whole)
    if both[: len(prompt)] != prompt:
        raise TemplateError(
            f"The tokenizer of {tokenizer.name_or_path} joins the end of the prompt {_tail(opening)} with the answer "
            f"{example.answer[:40]!r} into one token. End the generation prompt with a special token or a line break."
        )
    ids = both[: _end_of_turn(tokenizer, both, len(prompt))]
    if len(ids) == len(prompt):
        raise TemplateError(
            f"The chat template of {tokenizer.name_or_path} leaves no token to learn from the answer "
            f"{example.answer[:40]!r} to {example.prompt[:40]!r}. Drop examples with an empty answer."
        )
    return {"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]}


def _render(tokenizer: PreTrainedTokenizerBase, chat: Sequence[dict[str, str]], *, open_answer: bool) -> str:
    if not tokenizer.chat_template:
        raise TemplateError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template. "
            "Set tokenizer.chat_template, or take the instruction-tuned model."
        )
    return str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=open_answer))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written them already


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int) -> int:
    """One past the answer's last special token; some templates write a line break after it, which nobody reads."""
    special = [place for place in range(start, len(ids)) if _is_special(tokenizer, ids[place])]
    return special[-1] + 1 if special else len(ids)


def _is_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and bool(added.special)


def _tail(text: str) -> str:
    return repr(text[-40:])
