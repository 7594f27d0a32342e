"""What an example can be, one dataclass a kind; by `question`, what it asks, held-out rows are told apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""A turn of a conversation, in the form that chat templates take."""


@dataclass(frozen=True)
class Chat:
    """A conversation, in the form that chat templates take."""

    messages: list[Message]
    tools: list[Any] | None = None

    @property
    def question(self) -> Any:
        return [message for message in self.messages if message["role"] != "assistant"]


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on, as they stand."""

    prompt: str
    completion: str

    @property
    def question(self) -> Any:
        return self.prompt


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str

    @property
    def question(self) -> Any:
        return self.text


@dataclass(frozen=True)
class Labelled:
    """A text, or two, and a class or number."""

    text: str
    text_pair: str | None
    label: str | int | float

    @property
    def question(self) -> Any:
        return self.text, self.text_pair


@dataclass(frozen=True)
class Translation:
    """What an encoder reads and a decoder writes."""

    source: str
    target: str

    @property
    def question(self) -> Any:
        return self.source


@dataclass(frozen=True)
class Preference:
    """A prompt, the better answer and the worse one; as texts, or all three as messages."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]

    @property
    def question(self) -> Any:
        return self.prompt


@dataclass(frozen=True)
class Picture:
    """An image, {"path": ...} or {"bytes": ...}, and its class."""

    image: dict[str, Any]
    label: str | int | float

    @property
    def question(self) -> Any:
        return self.image.get("path") or self.image.get("bytes")


@dataclass(frozen=True)
class Speech:
    """A recording, {"path": ...} or {"bytes": ...}, and what is said."""

    audio: dict[str, Any]
    text: str

    @property
    def question(self) -> Any:
        return self.audio.get("path") or self.audio.get("bytes")


Example = Chat | Completion | Text | Labelled | Translation | Preference | Picture | Speech
