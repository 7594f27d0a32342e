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
from veneer.train.data.kinds import Message
from veneer.train.labels import IGNORED, Encoded

PLAIN = (
    "{% for message in messages %}"
    "### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""The template of a tokenizer that has none: a heading a turn, and the end-of-text token after an answer."""

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
THINK = re.compile(r"</?think>")
SPLITS = re.compile(r"split\(['\"]</think>|['\"]</think>['\"] in")
"""What templates have that find the reasoning inside an answer; others want it in a field of its own."""
MARK_OF_A_TURN = re.compile(r"<\|.+\|>")
PROBE = "veneer-probe"


class Rendered(NamedTuple):
    """One text, and the parts of it (start, end) that are learned."""

    text: str
    spans: list[tuple[int, int]]


@dataclass
class Template:
    """A tokenizer's chat template. `notes` collects what a user should know of it."""

    tokenizer: PreTrainedTokenizerBase
    notes: dict[str, None] = field(default_factory=dict)
    parts: bool = field(default=False, init=False)
    reasoning_apart: bool = field(default=False, init=False)
    arguments_as_text: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.name = self.tokenizer.name_or_path or type(self.tokenizer).__name__
        self.special = _special(self.tokenizer)
        self.marked = bool(MARKS.search(str(self.tokenizer.chat_template)))
        asked: Message = {"role": "user", "content": PROBE}
        answer: Message = {"role": "assistant", "content": "a"}
        # templates of models that see want lists of parts
        self.parts = not self._writes([asked]) and self._writes([asked], parts=True)
        if not SPLITS.search(str(self.tokenizer.chat_template)):
            thought = {**answer, "content": f"<think>{PROBE}</think>a"}
            self.reasoning_apart = self._writes([{**asked, "content": "q"}, thought], reasoning_apart=True)
        call = {"type": "function", "function": {"name": PROBE, "arguments": {"a": "b"}}}
        called = [{**asked, "content": "q"}, {**answer, "content": "", "tool_calls": [call]}]
        self.arguments_as_text = not self._writes(called) and self._writes(called, arguments_as_text=True)

    def _writes(self, messages: list[Message], **forms: bool) -> bool:
        """Whether the template writes PROBE, with messages in these forms."""
        before = {form: getattr(self, form) for form in forms}
        vars(self).update(forms)
        try:
            return PROBE in self.render(messages, None)
        except TemplateError:
            return False
        finally:
            vars(self).update(before)

    def encoded(self, messages: list[Message], tools: list[Any] | None, all_tokens: bool) -> list[tuple[Encoded, int]]:
        """The examples of a conversation, and how many tokens of each were joined over the edge of an answer.

        TemplateError where the place of an answer cannot be told, or something said is not in what was rendered.
        """
        if all_tokens:
            text = self.render(messages, tools)
            found = [Rendered(text, [(0, len(text))])]
        else:
            answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            messages = messages[: answers[-1] + 1] if answers else []
            marked = self._marks(messages, tools) if self.marked and messages else None
            found = [marked] if marked else list(self._by_difference(messages, tools))
        lost = _lost(messages, tools, found)
        if lost:
            raise TemplateError(
                f"The chat template of {self.name} leaves out {lost}. Drop such rows, or name a template that "
                "has it in data.chat_template."
            )
        return [_tokens(self.tokenizer, one) for one in found]

    def render(self, messages: Sequence[Message], tools: list[Any] | None, open_answer: bool = False) -> str:
        """The text of a conversation; `open_answer` ends where the assistant begins."""
        try:
            text = self.tokenizer.apply_chat_template(
                self._fitted(messages), tools=tools, tokenize=False, add_generation_prompt=open_answer
            )
        except (jinja2.TemplateError, TypeError, KeyError, IndexError) as wrong:
            raise self._cannot(messages, wrong) from wrong
        return str(text)

    def _cannot(self, messages: Sequence[Message], wrong: Exception) -> TemplateError:
        roles = ", ".join(message["role"] for message in messages)
        return TemplateError(
            f"The chat template of {self.name} cannot render the roles {roles}: {str(wrong).rstrip('.')}. Change the "
            "rows, or name another template in data.chat_template."
        )

    def _fitted(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in the form that this template reads."""
        found = []
        for message in messages:
            content = message["content"]
            if self.reasoning_apart and message["role"] == "assistant" and "</think>" in content:
                thought, _, content = content.rpartition("</think>")
                message = {**message, "reasoning_content": THINK.sub("", thought).strip()}
                content = content.lstrip("\n")
            if self.arguments_as_text and message.get("tool_calls"):
                calls = [{**call, "function": _as_text(call["function"])} for call in message["tool_calls"]]
                message = {**message, "tool_calls": calls}
            found.append({**message, "content": [{"type": "text", "text": content}] if self.parts else content})
        return found

    def _marks(self, messages: list[Message], tools: list[Any] | None) -> Rendered | None:
        """By the template's own marks; None where they do not cover the answers."""
        render: Any = render_jinja_template  # its annotations are of another version
        try:
            texts, marks = render(
                conversations=[self._fitted(messages)],
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(tools=tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, KeyError, IndexError) as wrong:
            raise self._cannot(messages, wrong) from wrong
        text = texts[0]
        spans: list[tuple[int, int]] = []
        for start, end in marks[0]:
            if spans and start <= spans[-1][1]:  # an answer and its end may be marked one by one
                start = spans.pop()[0]
            if text[start:end].strip():
                spans.append((start, end))
        found = self._ended(Rendered(text, [(start, len(text[:end].rstrip())) for start, end in spans]))
        lost = _lost(messages, tools, [found])
        if lost and text == self.render(messages, tools):
            self.notes["The marks of the template leave out parts of answers; these were found without the marks."] = (
                None
            )
        return None if lost or text != self.render(messages, tools) else found

    def _by_difference(self, messages: list[Message], tools: list[Any] | None) -> Iterator[Rendered]:
        """By rendering without and with each answer; several texts where a later one does not begin with an earlier."""
        current: Rendered | None = None
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            text, start = self._turn(messages, tools, number)
            span = (start, self._end(text, start, message))
            if current is None:
                current = Rendered(text, [span])
            elif text.startswith(current.text[: current.spans[-1][1]]):
                current = Rendered(text, [*current.spans, span])
            else:
                yield self._ended(current)
                current = Rendered(text, [span])
        if current is not None:
            yield self._ended(current)

    def _turn(self, messages: list[Message], tools: list[Any] | None, number: int) -> tuple[str, int]:
        """The text up to and including an assistant's turn, and where its answer starts there."""
        before, turn = messages[:number], messages[: number + 1]
        text = self.render(turn, tools)
        opening = self.render(before, tools, open_answer=True) if before else None
        if opening is not None and text.startswith(opening):
            return text, len(opening)
        one, two = (self.render([*before, {**turn[-1], "content": content}], tools) for content in ("Aa", "Bb"))
        start = _parting(one, two)
        base = self.render(before, tools) if before else ""
        if opening is not None and (reasoned := self._reasoned(turn[-1], opening, text, one[start + 2 :])):
            return reasoned, len(opening)
        thinks = turn[-1].get("reasoning_content") or "</think>" in turn[-1]["content"]
        said = turn[-1]["content"].strip()
        if thinks or start == len(one) or not (text.startswith(base) and text.startswith(one[:start] + said)):
            raise TemplateError(
                f"The chat template of {self.name} renders turn {number + 1} so that the place of the answer "
                f"cannot be told: before it came {(opening or '')[-40:]!r}, with it {text[-80:]!r}. Mark the "
                "answers in the template by {% generation %} and {% endgeneration %}, and name its file in "
                "data.chat_template."
            )
        if opening is not None:
            asked, stands = opening[len(base) :], text[len(base) : start]
            self.notes[f"Asked to answer, the template writes {asked!r}; before these answers stands {stands!r}."] = (
                None
            )
        return text, start

    def _reasoned(self, answer: Message, opening: str, text: str, end: str) -> str | None:
        """Where a template opens the reasoning for the model but leaves it out of answers: what the model writes."""
        content = str(answer["content"]).lstrip()
        thought = THINK.split(content)[-2].strip() if "</think>" in content else ""
        shared = next((size for size in range(len(content), 0, -1) if opening.endswith(content[:size])), 0)
        if not thought or thought in text or not shared or answer.get("tool_calls"):
            return None
        self.notes["The template opens the reasoning and leaves it out of answers; it was put behind the opening."] = (
            None
        )
        return opening + content[shared:] + end

    def _end(self, text: str, start: int, answer: Message) -> int:
        """One past the special tokens that end an answer; some templates write a line break or more after them."""
        said = THINK.split(answer["content"])[-1].strip()
        place = text.rfind(said, start) if said and not answer.get("tool_calls") else -1
        if place < 0:  # calls of tools may be made of special tokens
            last = [at + len(token) for token in self.special if (at := text.rfind(token, start)) >= 0]
            return max(last, default=len(text))
        first = [at for token in self.special if (at := text.find(token, place + len(said))) >= 0]
        if not first:
            return len(text)
        end = min(first)
        while token := self._token(text, end):
            end += len(token)
        return end

    def _token(self, text: str, place: int) -> str:
        """The special token that stands at a place, or nothing."""
        return next((token for token in self.special if text.startswith(token, place)), "")

    def _ended(self, rendered: Rendered) -> Rendered:
        """With the token that ends each answer: that of the next turn, or of the text, where a template writes none."""
        text, spans = rendered.text, []
        for start, end in rendered.spans:
            if not text[:end].endswith(tuple(self.special)):
                token = self._token(text, end)
                if not token and not text[end:].strip() and self.tokenizer.eos_token:
                    token = str(self.tokenizer.eos_token)
                    text = text[:end] + token
                    self.notes[f"The template ends an answer with nothing; {token} was put behind the last one."] = None
                end += len(token)
            spans.append((start, end))
        return Rendered(text, spans)


def _lost(messages: Sequence[Message], tools: list[Any] | None, rendered: Sequence[Rendered]) -> str | None:
    """A message, a call or a tool that is not where it should be, as many templates leave them out in silence."""
    if not rendered:
        return None
    whole = "\n".join(one.text for one in rendered)
    learned = "\n".join(one.text[start:end] for one in rendered for start, end in one.spans)
    for message in messages:
        answer = message["role"] == "assistant"
        pieces = (
            [*THINK.split(message["content"]), message.get("reasoning_content") or ""]
            if answer
            else [message["content"]]
        )
        for piece in pieces:
            if not _written(piece.strip(), learned if answer else whole):
                return f"the {message['role']}'s {piece.strip()[:40]!r}"
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in learned:
                return f"calls of tools ({call['function']['name']})"
    names = [str(tool.get("function", tool).get("name", "")) for tool in tools or () if isinstance(tool, dict)]
    return next((f"the tool {name}" for name in names if name not in whole), None)


def _as_text(function: Message) -> Message:
    """A call whose arguments are the JSON text that OpenAI has there."""
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _written(said: str, text: str) -> bool:
    """Whether it stands in a text: as it is, line by line, or as JSON, in which some write what a tool returns."""
    return (
        said in text
        or json.dumps(said, ensure_ascii=False)[1:-1] in text
        or all(line.strip() in text for line in said.splitlines())
    )


def _parting(one: str, two: str) -> int:
    """The place from which two texts differ."""
    return next((place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens, the longest first; also marks of turns that some models have as plain added tokens."""
    tokens = tokenizer.added_tokens_decoder.values()
    added = [str(token.content) for token in tokens if token.special or MARK_OF_A_TURN.fullmatch(token.content)]
    return sorted({*added, *map(str, tokenizer.all_special_tokens)} - {""}, key=len, reverse=True)


def _tokens(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> tuple[Encoded, int]:
    """Ids and labels of one text up to its last answer, and how many tokens lay across an edge."""
    edges = [edge for span in rendered.spans for edge in span]
    parts, joined = in_parts(tokenizer, [rendered.text[a:b] for a, b in zip([0, *edges[:-1]], edges, strict=True)])
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
    whole, *apart = plain_ids(tokenizer, ["".join(parts), *parts])
    if [token for part in apart for token in part] == whole:
        return apart, 0
    before = plain_ids(tokenizer, ["".join(parts[:number]) for number in range(1, len(parts))])
    across = sum(whole[: len(ids)] != ids for ids in before)
    if across:
        return apart, across
    ends = [0, *map(len, before)]
    return [whole[a:b] for a, b in zip(ends, [*ends[1:], len(whole)], strict=True)], 0  # SentencePiece marks each start


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without those that the tokenizer adds by itself: a template has written them already."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return found
