"""Conversations, completions and preferences out of a row's fields, as ShareGPT, OpenAI and Alpaca write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.errors import closest, listed
from veneer.train.data.fields import Wrong, kind_of, parsed, text_of
from veneer.train.data.kinds import Chat, Completion, Message, Preference

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


def alpaca(fields: dict[str, Any], folder: str) -> Chat:
    """Instruction, input and output, as Stanford Alpaca has them."""
    given = "\n\n".join(part for name in ("instruction", "input") if (part := text_of(fields, name).strip()))
    system = text_of(fields, "system")
    start = [{"role": "system", "content": system}] if system else []
    answer = {"role": "assistant", "content": text_of(fields, "output")}
    return Chat([*start, {"role": "user", "content": given}, answer])


def sharegpt(fields: dict[str, Any], folder: str) -> Chat:
    """Turns with `from` and `value`."""
    turns = parsed(fields["conversations"])
    if not isinstance(turns, list):
        raise Wrong(f"field 'conversations' is {kind_of(turns)}, not a list of turns")
    messages: list[Message] = []
    if system := text_of(fields, "system"):
        messages.append({"role": "system", "content": system})
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            if isinstance(turn, dict) and "role" in turn and not messages:  # messages under ShareGPT's name
                return Chat(messages_of(turns, "conversations"), tools_of(fields))
            raise Wrong(f"turn {number} of 'conversations' is not an object with 'from' and 'value'")
        speaker = turn["from"]
        if speaker not in SPEAKERS:
            near = closest(str(speaker), SPEAKERS)
            raise Wrong(
                f"turn {number} of 'conversations' is from {speaker!r}, which is none of {', '.join(SPEAKERS)}.{near}"
            )
        if speaker == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _calls(parsed(turn["value"]), number)})
        else:
            messages.append({"role": SPEAKERS[speaker], "content": turn["value"]})
    return Chat(messages_of(messages, "conversations"), tools_of(fields))


def openai(fields: dict[str, Any], folder: str) -> Chat:
    """Messages with `role` and `content`, and tools."""
    return Chat(messages_of(parsed(fields["messages"]), "messages"), tools_of(fields))


def messages_of(turns: Any, name: str) -> list[Message]:
    """Messages as chat templates take them: without empty fields, their parts joined, arguments of calls as objects."""
    if not isinstance(turns, list) or not turns:
        raise Wrong(f"field '{name}' is {kind_of(turns) if turns else 'empty'}, not a list of messages")
    found: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or "role" not in turn:
            raise Wrong(f"message {number} of '{name}' is not an object with 'role' and 'content'")
        if turn["role"] not in ROLES:
            near = closest(str(turn["role"]), ROLES)
            raise Wrong(
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
            raise Wrong(f"message {number} of '{name}' has parts of other kinds than text ({listed(map(str, kinds))})")
        return "".join(part["text"] for part in value)
    if value is not None and not isinstance(value, str):
        raise Wrong(f"message {number} of '{name}' has content that is {kind_of(value)}, not text")
    return value or ""


def _calls(value: Any, number: int) -> list[Any]:
    """Calls of tools as chat templates take them: the arguments as an object, not as the text that OpenAI has there."""
    calls = []
    for call in value if isinstance(value, list) else [value]:
        inner = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(inner, dict) or "name" not in inner:
            raise Wrong(f"turn {number} calls a tool without its name")
        arguments = parsed(inner.get("arguments") or {})
        kept = {"id": call["id"]} if call.get("id") else {}
        calls.append({**kept, "type": "function", "function": {"name": inner["name"], "arguments": _full(arguments)}})
    return calls


def tools_of(fields: Mapping[str, Any]) -> list[Any] | None:
    """The JSON schemas of the tools that a conversation may call."""
    tools = parsed(fields.get("tools") or None)
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise Wrong(f"field 'tools' is {kind_of(tools)}, not a list of JSON schemas")
    return [_full(tool) for tool in tools] or None


def completion(fields: dict[str, Any], folder: str) -> Chat | Completion:
    """A prompt and how it goes on: two texts, or two lists of messages."""
    prompt, completion = parsed(fields["prompt"]), parsed(fields["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):
        return Chat(messages_of(prompt, "prompt") + messages_of(completion, "completion"), tools_of(fields))
    return Completion(text_of(fields, "prompt"), text_of(fields, "completion"))


def preference(fields: dict[str, Any], folder: str) -> Preference:
    """Two answers to one prompt: texts, or lists of messages that may both begin with the prompt."""
    names = ("prompt", "chosen", "rejected")
    values = {name: parsed(fields.get(name)) for name in names}
    if isinstance(values["chosen"], list) and isinstance(values["rejected"], list):
        chosen, rejected = messages_of(values["chosen"], "chosen"), messages_of(values["rejected"], "rejected")
        if values["prompt"] is None or (isinstance(values["prompt"], str) and len(chosen) > 1):  # both begin with it
            shared = 0
            while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
                shared += 1
            if shared in (0, len(chosen), len(rejected)):
                raise Wrong("'chosen' and 'rejected' do not begin with the same prompt and then differ")
            return Preference(chosen[:shared], chosen[shared:], rejected[shared:])
        if isinstance(values["prompt"], str):
            return Preference([{"role": "user", "content": values["prompt"]}], chosen, rejected)
        return Preference(messages_of(values["prompt"], "prompt"), chosen, rejected)
    if values["prompt"] is None:
        raise Wrong("has no field 'prompt', which only messages may leave out")
    return Preference(*(text_of(fields, name) for name in names))


def _full(value: Any) -> Any:
    """Without the empty fields that Parquet puts into every object that another row's has: templates ask whether a
    field is there."""
    if isinstance(value, dict):
        return {key: _full(item) for key, item in value.items() if item is not None}
    return [_full(item) for item in value] if isinstance(value, list) else value
