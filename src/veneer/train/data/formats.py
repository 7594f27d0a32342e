"""What the fields of a row mean: the formats in use, each as a few typed fields and what an example of it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from veneer.errors import DataError, closest, listed
from veneer.train.data.sources import Row

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
} | {role: role for role in ROLES}
"""What ShareGPT files call the roles."""


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


class _Wrong(Exception):
    """What a row lacks, in words that follow its place."""


@dataclass(frozen=True)
class Format:
    """The fields of a format, those it must have first, and how a row becomes an example."""

    task: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[dict[str, Any], str], Example]
    example: str

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Wrong(f"field '{name}' is {_kind(value)}, not text")
    return value


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _label(fields: Mapping[str, Any]) -> str | int | float:
    value = fields["label"]
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, str | int | float):
        raise _Wrong(f"field 'label' is {_kind(value)}, not a name or a number")
    return value


def _media(fields: Mapping[str, Any], name: str, folder: str) -> dict[str, Any]:
    from pathlib import Path

    value = fields[name]
    if isinstance(value, dict) and value.get("bytes"):
        return {"path": None, "bytes": value["bytes"]}
    value = value.get("path") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise _Wrong(f"field '{name}' is {_kind(value)}, not the path of a file")
    path = Path(folder, value)  # an absolute path stays one
    if not path.is_file():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise _Wrong(f"field '{name}' names {value}, which is no file below {folder}.{closest(path.name, beside)}")
    return {"path": str(path), "bytes": None}


def _alpaca(fields: dict[str, Any], folder: str) -> Chat:
    given = "\n\n".join(part for name in ("instruction", "input") if (part := _text(fields, name).strip()))
    system = _text(fields, "system")
    start = [{"role": "system", "content": system}] if system else []
    answer = {"role": "assistant", "content": _text(fields, "output")}
    return Chat([*start, {"role": "user", "content": given}, answer])


def _sharegpt(fields: dict[str, Any], folder: str) -> Chat:
    turns = _parsed(fields["conversations"])
    if not isinstance(turns, list):
        raise _Wrong(f"field 'conversations' is {_kind(turns)}, not a list of turns")
    messages: list[Message] = []
    if system := _text(fields, "system"):
        messages.append({"role": "system", "content": system})
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            if isinstance(turn, dict) and "role" in turn and not messages:  # messages under ShareGPT's name
                return Chat(_messages(turns, "conversations"), _tools(fields))
            raise _Wrong(f"turn {number} of 'conversations' is not an object with 'from' and 'value'")
        speaker = turn["from"]
        if speaker not in SPEAKERS:
            near = closest(str(speaker), SPEAKERS)
            raise _Wrong(
                f"turn {number} of 'conversations' is from {speaker!r}, which is none of {', '.join(SPEAKERS)}.{near}"
            )
        if speaker == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _calls(_parsed(turn["value"]), number)})
        else:
            messages.append({"role": SPEAKERS[speaker], "content": turn["value"]})
    return Chat(_messages(messages, "conversations"), _tools(fields))


def _openai(fields: dict[str, Any], folder: str) -> Chat:
    return Chat(_messages(_parsed(fields["messages"]), "messages"), _tools(fields))


def _messages(turns: Any, name: str) -> list[Message]:
    """Messages as chat templates take them: without empty fields, their parts joined, arguments of calls as objects."""
    if not isinstance(turns, list) or not turns:
        raise _Wrong(f"field '{name}' is {_kind(turns) if turns else 'empty'}, not a list of messages")
    found: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or "role" not in turn:
            raise _Wrong(f"message {number} of '{name}' is not an object with 'role' and 'content'")
        if turn["role"] not in ROLES:
            near = closest(str(turn["role"]), ROLES)
            raise _Wrong(
                f"message {number} of '{name}' has the role {turn['role']!r}, none of {', '.join(ROLES)}.{near}"
            )
        message = {key: value for key, value in _full(turn).items() if key not in ("content", "tool_calls")}
        message["content"] = _content(turn.get("content"), number, name)
        if turn.get("tool_calls"):
            message["tool_calls"] = _calls(turn["tool_calls"], number)
        found.append(message)
    return found


def _content(value: Any, number: int, name: str) -> str:
    if isinstance(value, list):
        kinds = [part.get("type") if isinstance(part, dict) else None for part in value]
        if any(kind != "text" for kind in kinds):
            raise _Wrong(f"message {number} of '{name}' has parts of other kinds than text ({listed(map(str, kinds))})")
        return "".join(part["text"] for part in value)
    if value is not None and not isinstance(value, str):
        raise _Wrong(f"message {number} of '{name}' has content that is {_kind(value)}, not text")
    return value or ""


def _calls(value: Any, number: int) -> list[Any]:
    """Calls of tools as chat templates take them: the arguments as an object, not as the text that OpenAI has there."""
    calls = []
    for call in value if isinstance(value, list) else [value]:
        inner = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(inner, dict) or "name" not in inner:
            raise _Wrong(f"turn {number} calls a tool without its name")
        arguments = _parsed(inner.get("arguments") or {})
        kept = {"id": call["id"]} if call.get("id") else {}
        calls.append({**kept, "type": "function", "function": {"name": inner["name"], "arguments": _full(arguments)}})
    return calls


def _tools(fields: Mapping[str, Any]) -> list[Any] | None:
    tools = _parsed(fields.get("tools") or None)
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise _Wrong(f"field 'tools' is {_kind(tools)}, not a list of JSON schemas")
    return [_full(tool) for tool in tools] or None


def _parsed(value: Any) -> Any:
    """JSON that stands in a row as text, as in tables that have no columns of objects."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _full(value: Any) -> Any:
    """Without the empty fields that Parquet puts into every object that another row's has: templates ask whether a
    field is there."""
    if isinstance(value, dict):
        return {key: _full(item) for key, item in value.items() if item is not None}
    return [_full(item) for item in value] if isinstance(value, list) else value


def _completion(fields: dict[str, Any], folder: str) -> Chat | Completion:
    prompt, completion = _parsed(fields["prompt"]), _parsed(fields["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):
        return Chat(_messages(prompt, "prompt") + _messages(completion, "completion"), _tools(fields))
    return Completion(_text(fields, "prompt"), _text(fields, "completion"))


def _preference(fields: dict[str, Any], folder: str) -> Preference:
    names = ("prompt", "chosen", "rejected")
    values = {name: _parsed(fields.get(name)) for name in names}
    if isinstance(values["chosen"], list) and isinstance(values["rejected"], list):
        chosen, rejected = _messages(values["chosen"], "chosen"), _messages(values["rejected"], "rejected")
        if values["prompt"] is None or (isinstance(values["prompt"], str) and len(chosen) > 1):  # both begin with it
            shared = 0
            while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
                shared += 1
            if shared in (0, len(chosen), len(rejected)):
                raise _Wrong("'chosen' and 'rejected' do not begin with the same prompt and then differ")
            return Preference(chosen[:shared], chosen[shared:], rejected[shared:])
        if isinstance(values["prompt"], str):
            return Preference([{"role": "user", "content": values["prompt"]}], chosen, rejected)
        return Preference(_messages(values["prompt"], "prompt"), chosen, rejected)
    if values["prompt"] is None:
        raise _Wrong("has no field 'prompt', which only messages may leave out")
    return Preference(*(_text(fields, name) for name in names))


FORMATS: dict[str, Format] = {
    "sharegpt": Format(
        "causal", ("conversations",), ("system", "tools"), _sharegpt,
        '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}',
    ),
    "messages": Format(
        "causal", ("messages",), ("tools",), _openai,
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}',
    ),
    "preference": Format(
        "preference", ("chosen", "rejected"), ("prompt",), _preference,
        '{"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}',
    ),
    "alpaca": Format(
        "causal", ("instruction", "output"), ("input", "system"), _alpaca,
        '{"instruction": "Translate to French.", "input": "cat", "output": "chat"}',
    ),
    "prompt_completion": Format(
        "causal", ("prompt", "completion"), ("tools",), _completion,
        '{"prompt": "cat =>", "completion": " chat"}',
    ),
    "seq2seq": Format(
        "seq2seq", ("source", "target"), (),
        lambda fields, folder: Translation(_text(fields, "source"), _text(fields, "target")),
        '{"source": "translate: cat", "target": "chat"}',
    ),
    "speech": Format(
        "speech", ("audio", "text"), (),
        lambda fields, folder: Speech(_media(fields, "audio", folder), _text(fields, "text")),
        '{"audio": "clips/1.wav", "text": "good morning"}',
    ),
    "image_classification": Format(
        "image_classification", ("image", "label"), (),
        lambda fields, folder: Picture(_media(fields, "image", folder), _label(fields)),
        '{"image": "photos/1.png", "label": "cat"}',
    ),
    "pairs": Format(
        "sequence_classification", ("text", "text_pair", "label"), (),
        lambda fields, folder: Labelled(_text(fields, "text"), _text(fields, "text_pair"), _label(fields)),
        '{"text": "It rains.", "text_pair": "It is dry.", "label": "contradiction"}',
    ),
    "classification": Format(
        "sequence_classification", ("text", "label"), (),
        lambda fields, folder: Labelled(_text(fields, "text"), None, _label(fields)),
        '{"text": "A fine film.", "label": "positive"}',
    ),
    "text": Format(
        "causal", ("text",), (), lambda fields, folder: Text(_text(fields, "text")), '{"text": "Once upon a time …"}',
    ),
}  # fmt: skip
"""In the order in which they are tried: one that has another's fields and more stands before it."""


def recognized(row: Row, columns: Mapping[str, str]) -> str:
    """The format that a row's fields show. DataError tells what was there and what the formats want."""
    fields = set(renamed(row.fields, columns))
    for name, form in FORMATS.items():
        if fields.issuperset(form.required):
            return name
    wanted = "; ".join(f"{name}: {', '.join(form.required)}" for name, form in FORMATS.items())
    raise DataError(
        f"{row.where} has the fields {listed(row.fields, 8)}, which show no format ({wanted}). "
        "Say which by data.format, and by data.columns what the file calls its fields."
    )


def renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row's fields under the names that its format has for them."""
    taken = set(columns.values()) - set(columns)
    kept = {name: value for name, value in fields.items() if name not in taken}
    return kept | {name: fields[column] for name, column in columns.items() if column in fields}


def check_columns(name: str, columns: Mapping[str, str]) -> None:
    """DataError for a field that the format, or with "auto" any format, does not have."""
    forms = FORMATS.values() if name == "auto" else [FORMATS[name]]
    fields = list(dict.fromkeys(field for form in forms for field in form.fields))
    said = [
        f"data.columns maps '{field}', no field of {'any format' if name == 'auto' else name} ({', '.join(fields)})."
        f"{closest(field, fields)}"
        for field in columns
        if field not in fields
    ]
    if said:
        raise DataError("\n".join(said))


def parse(row: Row, name: str, columns: Mapping[str, str]) -> Example | str:
    """The example in a row, or what is wrong with it in words that follow its place."""
    form, fields = FORMATS[name], renamed(row.fields, columns)
    lacking = [field for field in form.required if fields.get(field) is None]
    if lacking:
        return _lacking(row.fields, fields, lacking, name, columns)
    try:
        return form.build(fields, row.folder)
    except _Wrong as wrong:
        text = str(wrong)
        return text if text.endswith(".") else f"{text}."


def _lacking(
    written: Mapping[str, Any], fields: Mapping[str, Any], lacking: Iterable[str], name: str, columns: Mapping[str, str]
) -> str:
    said = []
    for field in lacking:
        column = columns.get(field, field)
        if field in fields or column in written:
            said.append(f"field '{column}' is empty")
        else:
            said.append(f"no field '{column}'.{closest(column, written)}".rstrip("."))
    return (
        f"{'; '.join(said)}. The format {name} needs {', '.join(FORMATS[name].required)}; it has {listed(written, 8)}."
    )
