"""A model's anatomy for people: one block of each kind, with its sublayers, their roles and their shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from veneer import places
from veneer.counting import count_parameters
from veneer.errors import NoSuchPlace
from veneer.seams import anatomy
from veneer.seams.anatomy import Anatomy, Sublayer


def describe(model: nn.Module) -> dict[str, Any]:
    """Class, size, embeddings, heads, and one block of each kind; UnreadableModel where no probe can be traced."""
    read = anatomy.read(model)
    blocks: list[dict[str, Any]] = []
    for path in dict.fromkeys(read.block(one.ends.blocks) for one in read.sublayers):
        shown = [_sublayer(model, read, one) for one in read.sublayers if read.block(one.ends.blocks) == path]
        stack = path.rpartition(".")[0]
        alike = next((b for b in blocks if b["stack"] == stack and b["sublayers"] == _relative(shown, path)), None)
        if alike:
            alike["paths"].append(path)
        else:
            blocks.append({"stack": stack, "paths": [path], "sublayers": _relative(shown, path)})
    return {
        "class": type(model).__name__,
        "parameters": count_parameters(model).total,
        "embedding": _named(model, "embedding"),
        "blocks": blocks,
        "head": _named(model, "head"),
    }


def _named(model: nn.Module, role: str) -> list[dict[str, Any]]:
    try:
        found = places.find(model, role, "weight")
    except NoSuchPlace:
        return []
    return [{"path": place.path, "shape": list(place.shape)} for place in found]


def _sublayer(model: nn.Module, read: Anatomy, one: Sublayer) -> dict[str, Any]:
    inventory = places.weights(model)
    roles: dict[str, list[dict[str, Any]]] = {}
    for role, parts in one.roles.items():
        for part in parts:
            path = part.parameter.removesuffix(".weight")
            shape = inventory[path].shape if path in inventory else tuple(model.get_parameter(part.parameter).shape)
            rows = [list(span) for span in part.spans or ()]
            roles.setdefault(role, []).append({"path": path, "shape": list(shape), "rows": rows})
    output = one.ends.output
    return {
        "kind": one.kind,
        "width": one.ends.width,
        "output": output and [output[0], output[1]],
        "keys": {"module": one.module, "shape": list(one.heads)} if one.registered else None,
        "roles": roles,
    }


def _relative(sublayers: list[dict[str, Any]], block: str) -> list[dict[str, Any]]:
    """The same with paths below their block, so that blocks can be compared."""

    def below(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: below(item) for key, item in value.items()}
        if isinstance(value, list):
            return [below(item) for item in value]
        return value.removeprefix(f"{block}.") if isinstance(value, str) else value

    return [below(sublayer) for sublayer in sublayers]


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The drawing of what `describe` found."""
    yield f"{found['class']}, {found['parameters']:,} parameters"
    if "nf4" in found:
        yield f"{found['nf4']['weights']:,} of them in NF4, {found['nf4']['bits']:.3f} bits each"
    for one in found["embedding"]:
        yield f"embedding  {one['path']}  {_shape(one['shape'])}"
    for block in found["blocks"]:
        yield ""
        first, *others = block["paths"]
        yield f"{first or 'outside the blocks'}" + (f"  and {len(others)} alike, to {others[-1]}" if others else "")
        yield "│"
        for sublayer in block["sublayers"]:
            yield from _drawn(sublayer)
    for one in found["head"]:
        yield f"head  {one['path']}  {_shape(one['shape'])}"


def _drawn(sublayer: dict[str, Any]) -> Iterator[str]:
    keys = sublayer["keys"]
    seen = f", {keys['shape'][0]} key heads of {keys['shape'][1]}" if keys else ""
    yield f"├─ {sublayer['kind']}{seen}"
    rows = [
        (role, one["path"], _shape(one["shape"]) + _rows(one["rows"]))
        for role, parts in sublayer["roles"].items()
        for one in parts
    ]
    wide = max((len(path) for _, path, _ in rows), default=0)
    for role, path, shape in rows:
        yield f"│  {role:<4}  {path:<{wide}}  {shape}"
    if sublayer["output"]:
        path, item = sublayer["output"]
        yield f"⊕◄ {path}{'' if item is None else f'[{item}]'}, {sublayer['width']} wide"
    yield "│"


def _shape(shape: list[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _rows(rows: list[list[int]]) -> str:
    if not rows:
        return ""
    spans = ", ".join(f"{start}-{stop}" for start, stop in rows[:2])
    return f"  rows {spans}" + (f" and {len(rows) - 2} more spans" if len(rows) > 2 else "")
