"""Examples as what a model is trained on: token ids and labels, cut to a length, and a count of what that cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from veneer.errors import DataError, closest, listed
from veneer.train.data.chat import Template, in_parts, plain_ids
from veneer.train.data.kinds import (
    Chat,
    Completion,
    Example,
    Labelled,
    Message,
    Picture,
    Preference,
    Speech,
    Text,
    Translation,
)
from veneer.train.data.schema import Data
from veneer.train.labels import IGNORED

LONGEST = 2048
Columns = dict[str, Any]

CUTS: dict[str, tuple[str, ...]] = {
    "causal": ("end", "start", "drop", "refuse"),
    "preference": ("end", "start", "drop", "refuse"),
    "sequence_classification": ("end", "drop", "refuse"),
    "regression": ("end", "drop", "refuse"),
    "seq2seq": ("end", "drop", "refuse"),
    "speech": ("end", "drop", "refuse"),
}
"""What can become of examples that are too long; the end of an encoder's input is cut before its last special token."""


@dataclass
class Tally:
    """What encoding did to the examples."""

    truncated: int = 0
    split: int = 0
    joined: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class TooLong(DataError):
    """An example is longer than `max_length`, and the recipe says to refuse such."""


@dataclass
class Encoder:
    """Turns examples into the columns of one task."""

    data: Data
    task: str
    processing: Any
    labels: list[str] | None
    max_length: int
    cut: str
    all_tokens: bool
    template: Template | None = None
    tally: Tally = field(default_factory=Tally)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self.processing)

    def __call__(self, example: Example) -> Iterator[Columns]:
        """The rows that an example makes: mostly one; none where nothing of it can be learned."""
        match example:
            case Chat():
                yield from self._chat(example)
            case Completion():
                yield from self._completion(example)
            case Text():
                yield from self._text(example)
            case Labelled():
                yield from self._labelled(example)
            case Translation():
                yield from self._translation(example)
            case Preference():
                yield from self._preference(example)
            case Picture():
                yield {"image": example.image, "labels": self._class(example.label)}
            case Speech():
                yield from self._speech(example)

    def _chat(self, example: Chat) -> Iterator[Columns]:
        template = self._conversations()
        messages = self._with_system(example.messages)
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers and not self.all_tokens:
            self.tally.dropped["without an answer"] += 1
        elif any(not message["content"].strip() and not message.get("tool_calls") for message in answers):
            self.tally.dropped["with an empty answer"] += 1
        else:
            made = template.encoded(messages, example.tools, self.all_tokens)
            self.tally.split += len(made) > 1
            for encoded, joined in made:
                self.tally.joined += joined
                yield from self._fitted(encoded["input_ids"], encoded["labels"])

    def _conversations(self) -> Template:
        if self.template is None:
            raise DataError("messages, where the first row has texts. Train on one kind at a time.")
        return self.template

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.data.system is None or messages[0]["role"] in ("system", "developer"):
            return messages
        return [{"role": "system", "content": self.data.system}, *messages]

    def _completion(self, example: Completion) -> Iterator[Columns]:
        if not example.completion.strip():
            self.tally.dropped["with an empty answer"] += 1
            return
        (prompt, answer), joined = in_parts(self.tokenizer, (example.prompt, example.completion))
        self.tally.joined += joined
        before, after = ends(self.tokenizer)
        prompt, answer = before + prompt, answer + after
        yield from self._fitted(prompt + answer, (prompt if self.all_tokens else [IGNORED] * len(prompt)) + answer)

    def _text(self, example: Text) -> Iterator[Columns]:
        if not example.text.strip():
            self.tally.dropped["empty"] += 1
            return
        before, after = ends(self.tokenizer)
        [own] = plain_ids(self.tokenizer, [example.text])
        ids = before + own + after
        yield from self._fitted(ids, list(ids))

    def _fitted(self, ids: list[int], labels: list[int]) -> Iterator[Columns]:
        """At most `max_length` tokens, by the recipe's way of cutting; only what has something to learn."""
        longest = self.max_length
        for span in self._spans(len(ids)):
            kept = labels[span]
            if any(label != IGNORED for label in kept[1:]):
                yield {"input_ids": ids[span], "labels": kept, "length": min(len(ids), len(kept))}
            else:
                self.tally.dropped[
                    f"without anything to learn in {longest} tokens"
                    if len(ids) > longest
                    else "without anything to learn"
                ] += 1

    def _spans(self, length: int) -> Iterator[slice]:
        longest = self.max_length
        if length <= longest:
            yield slice(None)
        elif self._cuts(length):
            if self.cut == "split":
                starts = range(0, length - 1, longest)  # what would be a last row of one token teaches nothing
                yield from (slice(start, start + longest) for start in starts)
            else:
                yield slice(longest) if self.cut == "end" else slice(length - longest, None)

    def _cuts(self, length: int) -> bool:
        """Whether an example that is too long is kept; counts it."""
        if self.cut == "refuse":
            raise TooLong(
                f"{length} tokens are more than max_length {self.max_length}. Raise data.max_length, or choose another "
                "data.truncate."
            )
        if self.cut == "drop":
            self.tally.dropped[f"longer than {self.max_length} tokens"] += 1
            return False
        self.tally.truncated += 1
        return True

    def _labelled(self, example: Labelled) -> Iterator[Columns]:
        found = self._cut_by_tokenizer((example.text, example.text_pair))
        if found is not None:
            yield {**found, "labels": self._class(example.label), "length": len(found["input_ids"])}

    def _cut_by_tokenizer(self, texts: tuple[str, str | None], **options: Any) -> Columns | None:
        """What the tokenizer makes of it, with its special tokens whole."""
        length = len(self.tokenizer(*texts, verbose=False, **options)["input_ids"])
        if length > self.max_length and not self._cuts(length):
            return None
        found = self.tokenizer(*texts, truncation=True, max_length=self.max_length, verbose=False, **options)
        return {key: value for key, value in found.items() if key in ("input_ids", "token_type_ids")}

    def _translation(self, example: Translation) -> Iterator[Columns]:
        if not example.target.strip():
            self.tally.dropped["with an empty answer"] += 1
            return
        source = self._cut_by_tokenizer((example.source, None))
        target = source and self._target(example.target)
        if source and target:
            yield {"input_ids": source["input_ids"], "labels": target, "length": len(source["input_ids"])}

    def _target(self, text: str) -> list[int] | None:
        ids = list(self.tokenizer(text_target=text, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        if end is not None and end not in ids:
            ids.append(int(end))
        if len(ids) > self.max_length:
            return ids[: self.max_length] if self._cuts(len(ids)) else None
        return ids

    def _speech(self, example: Speech) -> Iterator[Columns]:
        if not example.text.strip():
            self.tally.dropped["with an empty answer"] += 1
            return
        labels = self._target(example.text)
        if labels:
            begin = self.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
            labels = labels[1:] if labels[0] == begin else labels  # the model puts it in front itself
            yield {"audio": example.audio, "labels": labels, "length": len(labels)}

    def _preference(self, example: Preference) -> Iterator[Columns]:
        found = [self._answered(example.prompt, answer) for answer in (example.chosen, example.rejected)]
        if None in found:
            self.tally.dropped["with an empty answer"] += 1
            return
        (prompt, chosen), (other, rejected) = (pair for pair in found if pair is not None)
        if prompt != other:
            raise DataError("'chosen' and 'rejected' do not follow the same tokens of the prompt.")
        length = len(prompt) + max(len(chosen), len(rejected))
        if length > self.max_length:
            if not self._cuts(length):
                return
            if self.cut == "start":
                prompt = prompt[length - self.max_length :]
            room = self.max_length - len(prompt)
            chosen, rejected = chosen[: max(0, room)], rejected[: max(0, room)]
        if not (prompt and chosen and rejected) or chosen == rejected:
            self.tally.dropped["without a difference between chosen and rejected"] += 1
            return
        whole = min(length, self.max_length)
        yield {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "length": whole}

    def _answered(
        self, prompt: str | Sequence[Message], answer: str | Sequence[Message]
    ) -> tuple[list[int], list[int]] | None:
        """The ids of a prompt and of one answer to it; None for an empty answer."""
        if isinstance(prompt, str) and isinstance(answer, str):
            if not answer.strip():
                return None
            (first, second), joined = in_parts(self.tokenizer, (prompt, answer))
            self.tally.joined += joined
            before, after = ends(self.tokenizer)
            return before + first, second + after
        template = self._conversations()
        if len(answer) != 1:
            raise DataError(
                f"an answer of {len(answer)} messages; 'chosen' and 'rejected' have one each, after the prompt."
            )
        messages = [*self._with_system([*prompt]), *answer]
        *_, (encoded, joined) = template.encoded(messages, None, all_tokens=False)
        self.tally.joined += joined
        ids, labels = encoded["input_ids"], encoded["labels"]
        start = len(ids) - next((i for i, label in enumerate(reversed(labels)) if label == IGNORED), 0)
        return ids[:start], ids[start:]

    def _class(self, label: str | int | float) -> int | float:
        if self.labels is None:
            try:
                return float(label)
            except ValueError:
                raise DataError(f"label {label!r} is no number.") from None
        try:
            return self.labels.index(str(label))
        except ValueError:
            raise DataError(
                f"label {label!r} is none of {listed(self.labels, 8)}.{closest(str(label), self.labels)}"
            ) from None


def tokenizer_of(processing: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or that of a processor for several kinds of input."""
    found = processing.tokenizer if isinstance(processing, ProcessorMixin) else processing
    if not isinstance(found, PreTrainedTokenizerBase):
        raise DataError(f"these rows need a tokenizer, not {type(processing).__name__}.")
    return found


def ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What stands before and after a text that no template surrounds: the start token where the tokenizer puts one
    itself, and the end-of-text token where there is one, so that the model learns to stop."""
    own = list(tokenizer("", verbose=False)["input_ids"])[:1]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return ([int(begin)] if begin is not None and own == [begin] else []), ([int(end)] if end is not None else [])
