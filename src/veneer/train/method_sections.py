"""The section `method` of a recipe: what is read off the methods' dataclasses, and the two that are made of others.

Gated gates each method below it; AdapterFusion attends over adapters that earlier runs made.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

import veneer
from veneer import methods
from veneer.delta import Method
from veneer.errors import RecipeError


class Section(BaseModel):
    """A part of a recipe. `short` names the option that a bare value stands for."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    short: ClassVar[str] = ""


class Fused(Section):
    """AdapterFusion over adapters of bottleneck methods on the same base.

    parts: two or more folders of adapters, such as runs/one/adapter.
    regularization: strength of the term that keeps V near the identity.
    """

    parts: Annotated[list[str], Field(min_length=2)]
    regularization: Annotated[float, Field(ge=0, allow_inf_nan=False)] = methods.AdapterFusion.regularization


def _made_of_methods(cls: type[Method]) -> bool:
    return any("Method" in str(hint) for hint in get_type_hints(cls, include_extras=True).values())


@cache
def method_options() -> dict[str, type[Section]]:
    """The options of each method as a section."""
    found: dict[str, type[Section]] = {}
    for name in methods.__all__:
        cls = vars(methods)[name]
        if not _made_of_methods(cls):
            found[name] = _section(name, cls)
    inside: dict[str, Any] = {name: (section | None, None) for name, section in found.items()}
    gated = create_model("Gated", __base__=Section, __doc__="A gate on each method below it (UniPELT).", **inside)
    return dict(sorted((found | {"Gated": gated, "AdapterFusion": Fused}).items()))


def _section(name: str, cls: type[Method]) -> type[Section]:
    """A method's fields, with `where` beside them."""
    hints = get_type_hints(cls, include_extras=True)
    options: dict[str, Any] = {"where": (str | None, None)}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            default: Any = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = ...
        options[field.name] = (hints[field.name], default)
    return create_model(name, __base__=Section, __doc__=(cls.__doc__ or "").split("\n")[0], **options)


@cache
def section() -> type[Section]:
    """One method or several, each with its options."""
    options: dict[str, Any] = {name: (cls | None, None) for name, cls in method_options().items()}
    return create_model("Methods", __base__=Section, __doc__="One method or several, each with its options.", **options)


def lengthened(value: Any) -> Any:
    """Short forms as what they stand for: a name alone, and a name with nothing behind it."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, dict):
        found = {name: {} if options is None else options for name, options in value.items()}
        return found | ({"Gated": lengthened(found["Gated"])} if "Gated" in found else {})
    return value


def named(section: Section) -> Iterator[tuple[str, Section]]:
    """(method, its options) of those that a recipe names."""
    return ((name, options) for name in type(section).model_fields if (options := vars(section)[name]) is not None)


def plain(section: Section) -> dict[str, Any]:
    """As `lengthened` gives it, without what is left to the method."""
    return {name: _plain(options) for name, options in named(section)}


def _plain(value: Section) -> dict[str, Any]:
    if isinstance(value, Fused):
        return value.model_dump()
    if type(value) is method_options()["Gated"]:
        return plain(value)
    return {key: each for key, each in json.loads(value.model_dump_json()).items() if each is not None}


def built(name: str, options: Section) -> list[tuple[Method, str | None]]:
    """The methods that a recipe's options of one name mean, and where each goes; MethodError for options that clash."""
    if isinstance(options, Fused):
        return [(methods.AdapterFusion(regularization=options.regularization), None)]
    if name == "Gated":
        inside = [each for inner, own in named(options) for each in built(inner, own)]
        if not inside:
            raise veneer.errors.MethodError("Gated names no method to put a gate on. Write Gated: {LoRA: {}}.")
        return [(methods.Gated(method), where) for method, where in inside]
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in vars(options).items()}
    where: Any = own.pop("where")
    method: Method = vars(methods)[name](**own)
    return [(method, where)]


def learning_rate(method: Method) -> float:
    """The rate that a method likes; of a gated one, that of the method inside."""
    return learning_rate(method.method) if isinstance(method, methods.Gated) else method.learning_rate


def by_place(section: Section) -> dict[str, tuple[Method, ...]]:
    """`where` -> methods, as `veneer.attach` takes them."""
    places: dict[str, tuple[Method, ...]] = {}
    for name, options in named(section):
        for method, where in built(name, options):
            where = method.default_where if where is None else where
            places[where] = (*places.get(where, ()), method)
    return places


def attach(model: Any, section: Section, also_train: Sequence[str]) -> veneer.Adapter:
    """The recipe's methods on a model; parts of a fusion are loaded for it, and leave the model again."""
    chosen = dict(named(section))
    fused = chosen.get("AdapterFusion")
    if not isinstance(fused, Fused):
        return veneer.attach(model, by_place(section), also_train=also_train)
    parts = []
    for number, folder in enumerate(fused.parts, start=1):
        if not Path(folder).is_dir():
            raise RecipeError(f"method.AdapterFusion.parts: {folder} is no folder of an adapter.")
        parts.append(veneer.load(model, folder, name=f"part{number}"))
    [(method, _)] = built("AdapterFusion", fused)
    assert isinstance(method, methods.AdapterFusion)
    adapter = veneer.fuse(model, parts, method=method, name="default", also_train=also_train)
    for part in parts:
        veneer.detach(model, part)
    return adapter
