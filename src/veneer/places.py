"""Where: roles, globs and regexes become places.

    attention, attention.q|k|v|o, cross_attention, cross_attention.q|k|v|o, mlp, mlp.gate|up|down
                    read off the model's data flow (transformers models)
    linear, block   every linear map in the repeated blocks, never the head
    embedding, head the token embedding, the projection over the vocabulary
    input           the token embedding that a forward reads first: the encoder's where the decoder has one, too
    norm            every module whose weight is a vector
    *.q_proj        a glob over module paths, matching whole dotted endings: `q_proj` means `*.q_proj`
    re:REGEX        a regular expression over the whole path
    a | b           the union; beside a regular expression the bar has a space on either side

A text means only places that the method acts on; naming none of those is an error that says what is near.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

from torch import nn

from veneer import formats, site
from veneer.delta import Place, Source, Span, Unit
from veneer.errors import NoSuchPlace, PlaceError, UnreadableModel, closest, listed
from veneer.formats.dense import Parameter
from veneer.patterns import matcher
from veneer.routes import Routes
from veneer.seams import anatomy, attention, inputs, positions, rotary, transformers, written

ROLES = (
    *("attention", "attention.q", "attention.k", "attention.v", "attention.o"),
    *("cross_attention", "cross_attention.q", "cross_attention.k", "cross_attention.v", "cross_attention.o"),
    *("mlp", "mlp.gate", "mlp.up", "mlp.down"),
    *("linear", "block", "embedding", "input", "head", "norm"),
)


def find(model: nn.Module, where: str, unit: Unit) -> list[Place]:
    """The places of `unit` that `where` names, each once, in the order of the model.

    Raises NoSuchPlace for a part of `where` that names none, and UnreadableModel where a role cannot be told.
    """
    inventory = _INVENTORIES[unit](model)
    found: dict[str, Place] = {}
    for text in _split(where):
        for place in _named(model, text, inventory, unit):
            found.setdefault(place.path, place)
    if unit == "parameter":
        return _tie(list(found.values()))
    order = {path: i for i, path in enumerate(inventory)}
    return sorted(found.values(), key=lambda place: (order[place.path.partition("[")[0]], place.spans or ()))


def _tie(found: list[Place]) -> list[Place]:
    """Places that mean one shared parameter become one place, so that it stays shared."""
    groups: dict[int, list[Place]] = {}
    for place in found:
        groups.setdefault(id(place.weight), []).append(place)
    return [dataclasses.replace(first, tied=tuple(others)) for first, *others in groups.values()]


def _split(where: str) -> list[str]:
    bar = " | " if "re:" in where else "|"
    return [text.strip() for text in where.split(bar)]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def weights(model: nn.Module) -> dict[str, Place]:
    """Every weight that a method on linear maps can act on, by path."""
    found: dict[str, Place] = {}
    claimed: set[int] = set()
    for path, module in site.base_modules(model):
        form = formats.of(module)
        if form is None or id(module) in claimed:
            continue
        for below, parameter in form.weights(module):
            owner = module.get_submodule(below)
            if form.tensor(owner, parameter) is None:
                continue  # computed from others at every read, as under weight_norm
            claimed.add(id(owner))
            name = _join(path, below) if parameter == "weight" else _join(path, below, parameter)
            found[name] = Place(
                path=name,
                reader_path=path,
                reader=module,
                owner_path=_join(path, below),
                owner=owner,
                parameter=parameter,
                format=form,
                shape=form.shape(owner, parameter),
                functional=form.functional(module),
            )
    return found


def parameters(model: nn.Module) -> dict[str, Place]:
    """Every parameter, by path, with the module that reads it."""
    functional = {place.owner_path: place for place in weights(model).values() if place.functional}
    found: dict[str, Place] = {}
    for path, module in site.base_modules(model):
        reader = functional.get(path)
        form = formats.of(module)
        for name, parameter in module.named_parameters(recurse=False):
            found[_join(path, name)] = Place(
                path=_join(path, name),
                reader_path=reader.reader_path if reader else path,
                reader=reader.reader if reader else module,
                owner_path=path,
                owner=module,
                parameter=name,
                format=form if form and form.quantized and name == "weight" else Parameter(),
                shape=form.shape(module, name) if form and name == "weight" else tuple(parameter.shape),
                functional=True,
            )
    return found


def _by_parameter(model: nn.Module) -> dict[str, Place]:
    """Every parameter by path; weights as those that know how they are stored, whatever they are stored in."""
    known = {_join(place.owner_path, place.parameter): place for place in weights(model).values()}
    return parameters(model) | known


def _shared_tables(model: nn.Module) -> dict[str, Place]:
    """Every embedding, with all weights that share its parameter; embeddings that share it are one place."""
    readers: dict[int, list[Place]] = {}
    for place in weights(model).values():
        readers.setdefault(id(place.weight), []).append(place)
    found = {}
    for group in readers.values():
        group.sort(key=lambda place: not isinstance(place.owner, nn.Embedding))
        first, *others = group
        if isinstance(first.owner, nn.Embedding):
            whole = dataclasses.replace(first, unit="table", tied=tuple(others))
            found.update({place.path: whole for place in group})
    return found


def _embeddings(model: nn.Module) -> dict[str, Place]:
    """The token embeddings, each with the modules around it that its positions pass through."""
    tables, blocks = _tables(model), anatomy.repeated(model)
    return {
        path: dataclasses.replace(place, sources=inputs.sources(model, path, tables, blocks))
        for path, place in weights(model).items()
        if path in tables
    }


def _tables(model: nn.Module) -> tuple[str, ...]:
    """The modules that turn token ids into embeddings: as the forward shows them, or as the model names its one."""
    try:
        return anatomy.read(model).tables
    except UnreadableModel:
        declared = transformers.input_embedding(model)
        return tuple(path for path, module in site.base_modules(model) if module is declared)


def _attentions(model: nn.Module) -> dict[str, Place]:
    """The attention modules whose keys and values can be reached, each with its key projection as its weight."""
    attention.wrap()
    projections = {place.owner_path: place for place in weights(model).values()}
    inventory = _by_parameter(model)
    named = dict(site.base_modules(model))
    read = anatomy.read(model)
    found: dict[str, Place] = {}
    learned = positions.sources(model, read.tables)
    shapes = {s.module: s.heads for s in read.sublayers if s.heads and not s.registered}
    refused = written.check(model, shapes)
    for sublayer in read.sublayers:
        reached = sublayer.registered or (sublayer.heads and not refused)
        parts = [part for role in "kvqo" for part in sublayer.roles.get(role, [])]
        if reached and parts and sublayer.module not in found:
            found[sublayer.module] = dataclasses.replace(
                inventory[parts[0].parameter],
                unit="attention",
                path=sublayer.module,
                reader_path=sublayer.module,
                reader=named[sublayer.module],
                shape=sublayer.heads,
                functional=not sublayer.registered,
                layer=read.layer(sublayer.ends.blocks),
                turn=functools.partial(rotary.turn, model, sublayer.module),
                projections=_projections(sublayer, projections),
                sources={} if found else learned,  # the first moves the tokens for all
            )
    return found


def _projections(sublayer: anatomy.Sublayer, weights: dict[str, Place]) -> dict[str, Place]:
    """The weights that make an attention's keys and values, by role, where each is made by one."""
    found = {}
    for role in "kv":
        parts = [(part, weights.get(part.parameter.rpartition(".")[0])) for part in sublayer.roles.get(role, [])]
        if len(parts) == 1 and parts[0][1] is not None:
            part, place = parts[0][0], parts[0][1]
            found[role] = place.restricted(part.spans, role) if part.spans else place
    return found


def _sublayers(model: nn.Module) -> dict[str, Place]:
    """The branches beside the residual stream, each where its output passes by; its last weight stands for it."""
    inventory = _by_parameter(model)
    named = dict(site.base_modules(model))
    read = anatomy.read(model)
    found: dict[str, Place] = {}
    for sublayer in read.sublayers:
        last = [part for role in ("q", "k", "up", "o", "down") for part in sublayer.roles.get(role, [])]
        if sublayer.ends.output is None or not last:
            continue
        path, item = sublayer.ends.output
        sources = {name: Source(at, named[at], key) for name, (at, key) in sublayer.ends.sources.items()}
        found[path] = dataclasses.replace(
            inventory[last[-1].parameter],
            unit="sublayer",
            path=path,
            reader_path=path,
            reader=named[path],
            shape=(sublayer.ends.width,),
            functional=False,
            item=item,
            layer=read.layer(sublayer.ends.blocks),
            sources=sources,
            norm=named[sublayer.ends.norm] if sublayer.ends.norm else None,
        )
    return found


_INVENTORIES: dict[Unit, Callable[[nn.Module], dict[str, Place]]] = {
    "weight": weights,
    "table": _shared_tables,
    "parameter": parameters,
    "attention": _attentions,
    "sublayer": _sublayers,
    "input": _embeddings,
}


def _named(model: nn.Module, text: str, inventory: dict[str, Place], unit: Unit) -> list[Place]:
    """The places that one part of a `where` names."""
    if text in ROLES:
        places = _by_role(model, text, inventory, unit)
        reason = _why_no_role(model, text, unit)
    else:
        match = matcher(text)
        below = matcher(f"{text}.*") if unit == "parameter" else match
        places = [
            place
            for path, place in inventory.items()
            if match(path) or below(path) or (place.functional and match(place.reader_path))
        ]
        reason = _why_no_path(model, text, inventory)
    if not places:
        raise NoSuchPlace(reason)
    return places


def _by_role(model: nn.Module, role: str, inventory: dict[str, Place], unit: Unit) -> list[Place]:
    if unit in ("attention", "sublayer"):
        kinds = _kinds(model, unit)
        if unit == "attention":
            _refuse_unreached(model, role, inventory)
        return [place for path, place in inventory.items() if kinds[path] == role or role == "block"]
    if role in ("linear", "block"):
        blocks = tuple(f"{path}." for path in anatomy.repeated(model))
        return [place for path, place in inventory.items() if path.startswith(blocks) and _is_matrix(place)]
    if role in ("embedding", "input"):
        tables = _tables(model)[: 1 if role == "input" else None]
        return [place for path, place in inventory.items() if path in tables or place.owner_path in tables]
    if role == "norm":
        return [place for place in inventory.values() if _is_norm(place.owner)]
    if role == "head":
        module = transformers.head(model)
        return [place for place in inventory.values() if place.owner is module]
    by_parameter = {_join(place.owner_path, place.parameter): place for place in inventory.values()}
    found = []
    for short, part in anatomy.read(model).parts(role):
        place = by_parameter.get(part.parameter)
        if place is not None:
            found.append(place.restricted(part.spans, short) if part.spans else place)
    return found


def _refuse_unreached(model: nn.Module, role: str, inventory: dict[str, Place]) -> None:
    """Raise where a role means attentions whose keys and values cannot be reached: none is left out in silence."""
    sublayers = [
        s for s in anatomy.read(model).sublayers if s.kind == role or (role == "block" and s.kind.endswith("attention"))
    ]
    missing = [s for s in sublayers if s.module not in inventory]
    if missing:
        shapes = {s.module: s.heads for s in anatomy.read(model).sublayers if s.heads and not s.registered}
        reason = written.check(model, shapes) if missing[0].heads else "its keys and values do not show"
        raise UnreadableModel(
            f"{missing[0].module} of {type(model).__name__} attends in code of its own, in front of which no keys can "
            f"stand: {reason}. Use a method on weights, such as LoRA, there."
        )


def _kinds(model: nn.Module, unit: Unit) -> dict[str, str]:
    """Kind of sublayer by the path of its place."""
    sublayers = anatomy.read(model).sublayers
    if unit == "attention":
        return {sublayer.module: sublayer.kind for sublayer in sublayers}
    return {sublayer.ends.output[0]: sublayer.kind for sublayer in sublayers if sublayer.ends.output}


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    below = [child for child in module.children() if not isinstance(child, site.Site)]
    return weight is not None and weight.dim() == 1 and not below


def _is_matrix(place: Place) -> bool:
    return len(place.shape) == 2 and not isinstance(place.owner, nn.Embedding)


def _why_no_role(model: nn.Module, role: str, unit: Unit) -> str:
    kind = type(model).__name__
    if role == "block" and unit in ("attention", "sublayer"):
        return f"{kind} has no {unit} that can be reached. Use a method on linear layers, such as LoRA."
    if role in ("linear", "block"):
        return f"{kind} has no linear layer inside a ModuleList of blocks. Name modules by a glob, such as where='*'."
    return f"{kind} has no {role}. Roles: {', '.join(ROLES)}; or name modules by a glob, such as where='*.q_proj'."


def _why_no_path(model: nn.Module, text: str, inventory: dict[str, Place]) -> str:
    match = matcher(text)
    others = [f"{path} ({type(module).__name__})" for path, module in site.base_modules(model) if match(path)]
    if others:
        return (
            f"where='{text}' names {listed(others, 2)} of {type(model).__name__}, on which this method does not act. "
            f"Name layers inside, such as where='{text}.*'."
        )
    near = closest(text, inventory)
    return f"No module of {type(model).__name__} matches where='{text}'.{near} Roles: {', '.join(ROLES)}."


def layers(model: nn.Module, places: Iterable[Place]) -> dict[str, int]:
    """The number of the block that each place lies in, -1 outside the blocks, by the place's path."""
    places = list(places)
    inside = anatomy.layers(model, {place.owner_path for place in places})
    known = ("attention", "sublayer")
    return {place.path: place.layer if place.unit in known else inside[place.owner_path] for place in places}


def check_name(model: nn.Module, name: str, taken: list[str]) -> None:
    """Raise PlaceError where an adapter of this name cannot be attached."""
    if not name.replace("-", "_").isidentifier() or name in dir(site.Site("", Routes())):
        raise PlaceError(
            f"An adapter cannot be named '{name}'. Use letters, digits, '_' and '-', starting with a letter, and no "
            "word that modules use for themselves."
        )
    if name in taken:
        raise PlaceError(f"The model already has an adapter '{name}'. Detach it first, or choose another name.")


def exact(model: nn.Module, unit: Unit, named: list[tuple[str, tuple[Span, ...] | None]]) -> list[Place]:
    """The places with exactly these paths and spans, as a file names them; NoSuchPlace for one that is not there."""
    inventory = _INVENTORIES[unit](model)
    found = []
    for path, spans in named:
        plain, _, label = path.partition("[")
        if plain not in inventory:
            raise NoSuchPlace(f"{type(model).__name__} has no {plain}.{closest(plain, inventory)}")
        place = inventory[plain]
        if spans:
            edges, rows = [edge for span in spans for edge in span], place.shape[place.format.rows]
            if edges != sorted(set(edges)) or not 0 <= edges[0] < edges[-1] <= rows:
                raise NoSuchPlace(f"{plain} has {rows} output rows, among which {spans} are no ascending spans.")
            place = place.restricted(spans, label.removesuffix("]"))
        found.append(place)
    return _tie(found) if unit == "parameter" else list({place.path: place for place in found}.values())
