"""What the `data` section asks of a format and of a tokenizer, refused where it would change nothing or cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, ProcessorMixin

from veneer.errors import DataError
from veneer.train.data import formats
from veneer.train.data.chat import PLAIN, Template
from veneer.train.data.encode import CUTS, LONGEST, tokenizer_of
from veneer.train.data.kinds import Chat, Preference
from veneer.train.data.schema import Data
from veneer.train.data.sources import Row

CHATS = ("alpaca", "sharegpt", "messages", "prompt_completion", "preference")


def check_options(data: Data, name: str) -> None:
    """DataError for all options that would change nothing for this format."""
    task = formats.FORMATS[name].task
    wrong = []
    for options, serve, who in (
        (("packing", "loss_on"), task == "causal", "causal language models"),
        (("system", "chat_template"), name in CHATS, "conversations"),
        (("labels",), task in ("sequence_classification", "image_classification"), "classes and numbers"),
        (("max_length", "truncate"), task != "image_classification", "tokens"),
    ):
        wrong += [
            f"data.{option} is for {who} and changes nothing for the format {name}. Leave it out."
            for option in options
            if data.told(option) and not serve
        ]
    if name == "text" and data.loss_on == "answers":
        wrong.append("data.loss_on: answers needs answers, which the format text does not have. Leave it out.")
    cuts = CUTS.get(task, ()) + (("split",) if name == "text" else ())
    if data.truncate and cuts and data.truncate not in cuts:
        wrong.append(f"data.truncate: {data.truncate} is not for the format {name}; choose {', '.join(cuts)}.")
    if data.labels == "numbers" and task == "image_classification":
        wrong.append("data.labels: numbers is for texts; images have classes.")
    if data.streaming and task in ("sequence_classification", "image_classification") and not data.labels:
        wrong.append("data.labels has to name the classes of a stream, which is not read before training.")
    if wrong:
        raise DataError("\n".join(wrong))


def check_processing(task: str, processing: Any) -> None:
    """DataError for what cannot make a batch of these rows."""
    if task == "image_classification":
        if not isinstance(processing, BaseImageProcessor):
            raise DataError(f"Images need an image processor, not {type(processing).__name__}.")
    elif task == "speech" and not isinstance(processing, ProcessorMixin):
        raise DataError(
            f"Speech needs a processor with feature extractor and tokenizer, not {type(processing).__name__}."
        )
    else:
        tokenizer_of(processing)


def template(data: Data, name: str, processing: Any, first: Row) -> Template | None:
    """The template of conversations, put onto the tokenizer where it has none or the recipe names one."""
    example = formats.parse(first, name, data.columns)
    chats = isinstance(example, Chat) or (isinstance(example, Preference) and not isinstance(example.chosen, str))
    if not chats:
        idle = [option for option in ("system", "chat_template") if data.told(option)]
        if idle and name in CHATS:
            raise DataError(f"data.{' and data.'.join(idle)} is for messages; the rows of {first.where} are texts.")
        return None
    tokenizer = tokenizer_of(processing)
    if data.chat_template:
        path = Path(data.chat_template)
        if not path.is_file():
            raise DataError(f"data.chat_template names {path}, which does not exist.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN
    return Template(tokenizer)


def max_length(data: Data, task: str, processing: Any) -> int | None:
    """Tokens that an example may have; None for images. DataError for more than the tokenizer's model takes."""
    if task == "image_classification":
        return None
    most = tokenizer_of(processing).model_max_length
    if data.max_length and data.max_length > most:
        raise DataError(
            f"data.max_length is {data.max_length}, but the tokenizer says that its model takes {most} tokens. Lower "
            "it, or set tokenizer.model_max_length where the model takes more."
        )
    return data.max_length or min(LONGEST, most)
