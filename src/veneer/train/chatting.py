"""A conversation with an adapted model in a terminal: streamed answers, turns by the chat template, and the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TextStreamer

import veneer
from veneer.seams.quiet import quiet
from veneer.train.batch import Collator
from veneer.train.evaluate import evaluating, on_device
from veneer.train.examples import encode_turns

HELP = "/base answers the last question by the base alone, /reset forgets the conversation, /quit ends it."


class Chat:
    """What was said so far, and the model that answers; always the likeliest words."""

    def __init__(
        self, model: Any, tokenizer: Any, system: str, max_new_tokens: int, say: Callable[[str], None]
    ) -> None:
        self.model, self.tokenizer, self.say = model, tokenizer, say
        self.max_new_tokens = max_new_tokens
        self.collator = Collator.of(model, tokenizer)
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []

    def ask(self, question: str) -> str:
        """The answer to a question, in the light of all turns before; it is said piece by piece as it comes."""
        asked = [*self.turns, {"role": "user", "content": question}]
        answer = self._answer(asked)
        self.turns = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def base(self) -> str | None:
        """What the base alone answers to the last question; the conversation does not take it in. None: no question."""
        if not self.turns:
            return None
        with veneer.use(self.model):
            return self._answer(self.turns[:-1])

    def reset(self) -> None:
        """Forget all turns."""
        self.turns = []

    def _answer(self, turns: list[dict[str, str]]) -> str:
        batch = on_device(self.model, self.collator.questions([encode_turns(self.tokenizer, [*self.system, *turns])]))
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "pad_token_id": self.collator.padding}
        streamer = _Streamer(self.tokenizer, self.say)
        with evaluating(self.model), quiet():
            self.model.generate(**batch, **options, streamer=streamer)
        return streamer.text.strip()


class _Streamer(TextStreamer):
    """Gives each piece of text on as soon as no later token can change it."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say, self.text = say, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.say(text)


def converse(chat: Chat, read: Callable[[], str]) -> None:
    """Ask what `read` gives until it gives /quit or ends; Ctrl-C breaks off an answer, not the conversation."""
    chat.say(f"{HELP}\n")
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            chat.say("\n")
            return
        try:
            if line == "/quit":
                return
            if line == "/reset":
                chat.reset()
                chat.say("The conversation is forgotten.\n")
            elif line == "/base":
                chat.say("\n" if chat.base() is not None else "There is no question yet.\n")
            elif line.startswith("/"):
                chat.say(f"{line.split()[0]} is no command. {HELP}\n")
            elif line:
                chat.ask(line)
                chat.say("\n")
        except KeyboardInterrupt:
            chat.say("\nBroken off; that question and its answer are left out.\n")
