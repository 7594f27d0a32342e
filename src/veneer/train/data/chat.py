"""Conversations as token ids, with a label on what the assistant says and on nothing else.

Which tokens are the assistant's is not searched for. A template is rendered up to where an assistant begins, and again
with the turn in place; what the second has beyond the first is the turn and its end. Templates that mark the turns
themselves ({% generation %}) are taken at their word. What a stock template does without marks is to give transformers'
own mask nothing but zeros, in silence.

Some templates write earlier turns otherwise than the last one: without their reasoning, without an end. A turn is then
learned where it was the last, and a conversation becomes several examples, each of which is what the model would have
before it. Where renderings do not begin with one another, the place of the answer is found by putting other answers
there; where that shows nothing either, the template is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from veneer.errors import TemplateError
from veneer.train.data.formats import Message
from veneer.train.encoding import IGNORED, Encoded

PLAIN = (
    "{% for message in messages %}"
    "### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""The template of a tokenizer that has none: a heading a turn, and the end-of-text token after an answer."""

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """One text, and the parts of it (start, end) that are learned."""

    text: str
    spans: list[tuple[int, int]]


@dataclass
class Template:
    """A tokenizer's chat template. `notes` collects what a user should know of it."""

    tokenizer: PreTrainedTokenizerBase
    notes: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.tokenizer.name_or_path or type(self.tokenizer).__name__
        self.marked = bool(MARKS.search(str(self.tokenizer.chat_template)))

    def encoded(self, messages: list[Message], tools: list[Any] | None, all_tokens: bool) -> list[tuple[Encoded, int]]:
        """The examples of a conversation, and how many tokens of each were joined over the edge of an answer.

        TemplateError where the place of an answer cannot be told, or something said is not in what was rendered.
        """
        if not all_tokens:
            answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            messages = messages[: answers[-1] + 1] if answers else []
        rendered = list(self.rendered(messages, tools, all_tokens)) if messages else []
        self._check_nothing_lost(messages, tools, rendered)
        return [_tokens(self.tokenizer, one, all_tokens) for one in rendered]

    def rendered(self, messages: list[Message], tools: list[Any] | None, all_tokens: bool) -> Iterator[Rendered]:
        """The texts of a conversation with what is learned of each."""
        if all_tokens:
            yield Rendered(self.render(messages, tools), [])
            return
        if self.marked:
            text, spans = self._marks(messages, tools)
            if spans:
                yield Rendered(text, spans)
                return
            self.notes["The template has {% generation %} marks that marked nothing; answers were found without."] = (
                None
            )
        current: Rendered | None = None
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            text, start = self._turn(messages, tools, number)
            span = (start, _end(self.tokenizer, text, start))
            if current is None:
                current = Rendered(text, [span])
            elif text.startswith(current.text[: current.spans[-1][1]]):
                current = Rendered(text, [*current.spans, span])
            else:
                yield current
                current = Rendered(text, [span])
        if current is not None:
            yield current

    def render(self, messages: Sequence[Message], tools: list[Any] | None, open_answer: bool = False) -> str:
        """The text of a conversation; `open_answer` ends where the assistant begins."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=open_answer
            )
        except (jinja2.TemplateError, TypeError, KeyError, IndexError) as wrong:
            roles = ", ".join(message["role"] for message in messages)
            raise TemplateError(
                f"The chat template of {self.name} cannot render the roles {roles}: {wrong}."
            ) from wrong
        return str(text)

    def _turn(self, messages: list[Message], tools: list[Any] | None, number: int) -> tuple[str, int]:
        """The text up to and including an assistant's turn, and where its answer starts there."""
        text = self.render(messages[: number + 1], tools)
        opening = self._opening(messages[:number], tools)
        if opening is not None and text.startswith(opening):
            return text, len(opening)
        start = self._start_by_trial(messages[: number + 1], tools, text)
        if start is None:
            raise TemplateError(
                f"The chat template of {self.name} renders turn {number + 1} so that the place of the answer "
                f"cannot be told: before it came {(opening or '')[-40:]!r}, with it {text[-80:]!r}. Mark the "
                "answers in the template by {% generation %} and {% endgeneration %}, and "
                "name the file in data.chat_template."
            )
        if opening is not None:
            start_there = opening[min(_parting(opening, text), start) :]
            self.notes[f"The template begins an answer with {start_there!r}, which the answers here do not have."] = (
                None
            )
        return text, start

    def _opening(self, before: list[Message], tools: list[Any] | None) -> str | None:
        return self.render(before, tools, open_answer=True) if before else None

    def _start_by_trial(self, messages: list[Message], tools: list[Any] | None, text: str) -> int | None:
        """Where the content of the last turn starts: where renderings with two other contents part, all before it."""
        last = messages[-1]
        if last.get("tool_calls") or last.get("reasoning_content") or "</think>" in last["content"]:
            return None
        if messages[:-1] and not text.startswith(self.render(messages[:-1], tools)):
            return None
        one, two = (self.render([*messages[:-1], {**last, "content": content}], tools) for content in ("Aa", "Bb"))
        start = _parting(one, two)
        if start == len(one) or text[:start] != one[:start] or not text[start:].startswith(last["content"].strip()):
            return None
        return start

    def _marks(self, messages: list[Message], tools: list[Any] | None) -> Rendered:
        render: Any = render_jinja_template  # its annotations are of another version
        texts, marks = render(
            conversations=[messages],
            tools=tools,
            chat_template=self.tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        text = texts[0]
        if text != self.render(messages, tools):
            raise TemplateError(f"The chat template of {self.name} renders a conversation differently with its marks.")
        spans = [(start, self._closed(text, end)) for start, end in marks[0] if end > start]
        return Rendered(text, spans)

    def _closed(self, text: str, end: int) -> int:
        """The end of a marked answer with the token that ends its turn, which some templates leave outside the mark."""
        marked = text[:end].rstrip()
        if any(marked.endswith(token) for token in _special(self.tokenizer)):
            return len(marked)
        return end + len(next((token for token in _special(self.tokenizer) if text.startswith(token, end)), ""))

    def _check_nothing_lost(
        self, messages: list[Message], tools: list[Any] | None, rendered: Sequence[Rendered]
    ) -> None:
        """TemplateError for a message, a call or a tool that the template leaves out, as many do in silence."""
        whole = "\n".join(one.text for one in rendered)
        for message in messages:
            said = message["content"].rpartition("</think>")[2].strip()
            written = (said, json.dumps(said, ensure_ascii=False)[1:-1])  # some write what a tool returns as JSON
            if not any(form in whole for form in written) and any(
                line.strip() not in whole for line in said.splitlines()
            ):
                raise TemplateError(
                    f"The chat template of {self.name} leaves out the {message['role']}'s {said[:40]!r}. Drop such "
                    "messages, or name a template that has them in data.chat_template."
                )
            for call in message.get("tool_calls", ()):
                if call["function"]["name"] not in whole:
                    raise TemplateError(
                        f"The chat template of {self.name} leaves out calls of tools ({call['function']['name']}). "
                        "Take the template of a model that calls tools, in data.chat_template."
                    )
        for tool in tools or () if rendered else ():
            name = str(tool.get("function", tool).get("name", "")) if isinstance(tool, dict) else ""
            if name not in whole:
                raise TemplateError(
                    f"The chat template of {self.name} leaves out the tool {name}. Take the template of a model that "
                    "calls tools, in data.chat_template."
                )


def _parting(one: str, two: str) -> int:
    """The place from which two texts differ."""
    return next((place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens, the longest first."""
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *map(str, tokenizer.all_special_tokens)}, key=len, reverse=True)


def _end(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> int:
    """One past the last special token of the answer; some templates write a line break after it, which nobody reads."""
    ends = [
        place + len(token) for token in _special(tokenizer) if token and (place := text.rfind(token, start)) >= start
    ]
    return max(ends, default=len(text))


def _tokens(tokenizer: PreTrainedTokenizerBase, rendered: Rendered, all_tokens: bool) -> tuple[Encoded, int]:
    """Ids and labels of one text; with all tokens, the text to its end."""
    if all_tokens:
        ids = plain_ids(tokenizer, rendered.text)
        return {"input_ids": ids, "labels": list(ids)}, 0
    edges = [edge for span in rendered.spans for edge in span]
    text = rendered.text[: edges[-1]]
    starts = [0, *edges[:-1]]
    parts, joined = in_parts(tokenizer, [text[a:b] for a, b in zip(starts, edges, strict=True)])
    ids, labels = [], []
    for number, part in enumerate(parts):
        ids += part
        labels += part if number % 2 else [IGNORED] * len(part)
    return {"input_ids": ids, "labels": labels}, joined


def in_parts(tokenizer: PreTrainedTokenizerBase, parts: Sequence[str]) -> tuple[list[list[int]], int]:
    """The token ids of each part of a text, and how many tokens of the whole text would lie across an edge.

    Where edges of parts are edges of tokens, the ids are those of the whole. Otherwise each part is tokenized alone,
    which is what generation does: a prompt is tokenized before there is an answer that could be joined to it.
    """
    whole = plain_ids(tokenizer, "".join(parts))
    apart = [plain_ids(tokenizer, part) for part in parts]
    if [token for part in apart for token in part] == whole:
        return apart, 0
    ends, text, across = [0], "", 0
    for part in parts[:-1]:
        text += part
        before = plain_ids(tokenizer, text)
        across += whole[: len(before)] != before
        ends.append(len(before))
    if across:
        return apart, across
    return [whole[a:b] for a, b in zip(ends, [*ends[1:], len(whole)], strict=True)], 0  # SentencePiece marks each start


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without those that the tokenizer adds by itself: a template has written them already."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
