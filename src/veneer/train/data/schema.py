"""The `data` section of a recipe: what to train on, and what of it is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from veneer.errors import DataError, closest

FormatName = Literal[
    "auto",
    "alpaca",
    "sharegpt",
    "messages",
    "prompt_completion",
    "text",
    "classification",
    "pairs",
    "seq2seq",
    "preference",
    "image_classification",
    "speech",
]
Truncate = Literal["end", "start", "split", "drop", "refuse"]
Count = Annotated[int, Field(ge=1)]


class Data(BaseModel):
    """What to train on; a bare string or a list of strings in a recipe is the `path`.

    Defaults:
        path: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt, .md), a folder of such or of images in one folder a
            class, several of these, or an id of the `datasets` library.
        name, split: configuration and split of an id; the split is "train" where none is named.
        format: read off the fields of the first row.
        columns: the format's field -> the file's column, for files that call a field by another name.
        held_out: a fraction or a count of the rows, chosen by what they ask, so that rows which ask the same are never
            on both sides; or another file; 0 for none. Of a stream, a count is its first rows.
        max_length: tokens of one example; 2048, or what the tokenizer says that its model can take if that is less.
        truncate: what becomes of a longer one. "end" and "start" cut there, "split" makes several of it, "drop" leaves
            it out, "refuse" stops. "split" for the format "text", otherwise "end".
        packing: several examples in one row of at most `max_length` tokens, none of which sees another.
        streaming: read while training, never all at once: for what does not fit on the disk of this machine.
        loss_on: the tokens that are learned: those of the answers, or all. "all" for the format "text".
        system: the system message of conversations that have none.
        chat_template: a file with the Jinja template of conversations, in place of the tokenizer's own.
        labels: names of the classes, in the order of their numbers; or "numbers" to learn the label as a number. As
            found, in alphabetical order; labels with a decimal point are numbers.
        limit: at most so many rows, chosen by the seed; of a stream, its first.
        drop_duplicates: leave out of training what is in it already, or in the held-out rows.
        shuffle: the order of training is chosen by the seed, not by the file.
        shuffle_buffer: rows of a stream among which the next one is chosen.
        seed: chooses held-out rows and order; None is the recipe's.

    Errors:
        DataError for an option that would change nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | list[str]
    name: str | None = None
    split: str | None = None
    format: FormatName = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
    held_out: Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0)] | str = Field(
        default=0.05, union_mode="left_to_right"
    )
    max_length: Count | None = None
    truncate: Truncate | None = None
    packing: bool = False
    streaming: bool = False
    loss_on: Literal["answers", "all"] | None = None
    system: str | None = None
    chat_template: str | None = None
    labels: list[str] | Literal["numbers"] | None = None
    limit: Count | None = None
    drop_duplicates: bool = False
    shuffle: bool = True
    shuffle_buffer: Count = 10_000
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | list) else value

    @model_validator(mode="after")
    def _told(self) -> Data:
        if not self.paths or not all(self.paths):
            raise ValueError("path is empty; name a file, a folder or an id of the datasets library")
        if "shuffle_buffer" in self.model_fields_set and not (self.streaming and self.shuffle):
            raise ValueError("shuffle_buffer changes nothing without streaming and shuffle; leave it out")
        if self.streaming and self.drop_duplicates:
            raise ValueError("drop_duplicates has to remember all rows, which streaming does not; leave one out")
        return self

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else self.path

    def told(self, option: str) -> bool:
        """Whether the recipe says something about this option."""
        return option in self.model_fields_set and getattr(self, option) is not None

    @classmethod
    def of(cls, value: Any, base: Path | None = None) -> Data:
        """From what stands under `data:` in a recipe; relative paths are below `base`. DataError says all."""
        try:
            found = cls.model_validate(value)
        except ValidationError as wrong:
            raise DataError("\n".join(dict.fromkeys(map(_said, wrong.errors(include_url=False))))) from None
        return found if base is None else found.below(base)

    def below(self, base: Path) -> Data:
        """The same with relative paths taken from the folder `base`, where there is such a file."""

        def place(path: str) -> str:
            return str(base / path) if (base / path).exists() else path

        paths = [place(path) for path in self.paths]
        update: dict[str, Any] = {"path": paths if isinstance(self.path, list) else paths[0]}
        update |= {
            key: place(value) for key in ("held_out", "chat_template") if isinstance(value := getattr(self, key), str)
        }
        return self.model_copy(update=update)


KINDS = {
    "path": "a file, a folder, an id, or a list of these",
    "held_out": "a fraction below 1, a count, or a file",
    "labels": "a list of names, or numbers",
}
"""What an option with several kinds of values takes."""


def _said(one: Any) -> str:
    """One mistake that pydantic found, with the option's place, and the nearest option for an unknown one."""
    option, *inner = [str(part) for part in one["loc"]] or [""]
    if one["type"] == "extra_forbidden":
        return f"data.{option} is no option of data.{closest(option, Data.model_fields)}"
    if one["type"] == "value_error":
        return f"data: {one['msg'].removeprefix('Value error, ')}."
    if option in KINDS:
        return f"data.{option} is not {KINDS[option]}."
    seen = "" if one["type"] == "missing" else f", not {one['input']!r}"
    where = ".".join(["data", option, *inner]) if option else "data"
    return f"{where}: {one['msg']}{seen}."
