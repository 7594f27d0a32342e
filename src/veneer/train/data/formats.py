"""What the fields of a row mean: the formats in use, each as a few typed fields and what an example of it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from veneer.errors import DataError, closest, listed
from veneer.train.data import conversations
from veneer.train.data.fields import Wrong, label_of, media_of, text_of
from veneer.train.data.kinds import Example, Labelled, Picture, Speech, Text, Translation
from veneer.train.data.sources import Row


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


FORMATS: dict[str, Format] = {
    "sharegpt": Format(
        "causal", ("conversations",), ("system", "tools"), conversations.sharegpt,
        '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}',
    ),
    "messages": Format(
        "causal", ("messages",), ("tools",), conversations.openai,
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}',
    ),
    "preference": Format(
        "preference", ("chosen", "rejected"), ("prompt",), conversations.preference,
        '{"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}',
    ),
    "alpaca": Format(
        "causal", ("instruction", "output"), ("input", "system"), conversations.alpaca,
        '{"instruction": "Translate to French.", "input": "cat", "output": "chat"}',
    ),
    "prompt_completion": Format(
        "causal", ("prompt", "completion"), ("tools",), conversations.completion,
        '{"prompt": "cat =>", "completion": " chat"}',
    ),
    "seq2seq": Format(
        "seq2seq", ("source", "target"), (),
        lambda fields, folder: Translation(text_of(fields, "source"), text_of(fields, "target")),
        '{"source": "translate: cat", "target": "chat"}',
    ),
    "speech": Format(
        "speech", ("audio", "text"), (),
        lambda fields, folder: Speech(media_of(fields, "audio", folder), text_of(fields, "text")),
        '{"audio": "clips/1.wav", "text": "good morning"}',
    ),
    "image_classification": Format(
        "image_classification", ("image", "label"), (),
        lambda fields, folder: Picture(media_of(fields, "image", folder), label_of(fields)),
        '{"image": "photos/1.png", "label": "cat"}',
    ),
    "pairs": Format(
        "sequence_classification", ("text", "text_pair", "label"), (),
        lambda fields, folder: Labelled(text_of(fields, "text"), text_of(fields, "text_pair"), label_of(fields)),
        '{"text": "It rains.", "text_pair": "It is dry.", "label": "contradiction"}',
    ),
    "classification": Format(
        "sequence_classification", ("text", "label"), (),
        lambda fields, folder: Labelled(text_of(fields, "text"), None, label_of(fields)),
        '{"text": "A fine film.", "label": "positive"}',
    ),
    "text": Format(
        "causal", ("text",), (), lambda fields, folder: Text(text_of(fields, "text")), '{"text": "Once upon a time …"}',
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
    except Wrong as wrong:
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
