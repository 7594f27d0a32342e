"""Putting adapters on a model and taking them off: claims are collected and checked, then applied."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from veneer import checkpoints, formats, places, sharding, site
from veneer.collecting import uncollected
from veneer.delta import Before, Method, Place, Weight
from veneer.errors import MethodError, NoSuchPlace, Overlap, PlaceError, closest
from veneer.handle import STATE, Adapter, Claim, state_of
from veneer.methods import FullFineTuning
from veneer.routing import activate

Methods = Method | tuple[Method, ...]
Where = str | Sequence[str]


def attach(
    model: nn.Module,
    method: Methods | Mapping[str, Methods],
    where: Where | None = None,
    *,
    name: str = "default",
    also_train: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Put a trained layer on a frozen model, and make it the one that acts and trains.

    `method` is one method, a tuple of methods stacked in order, or a mapping from `where` to either. `where` is a text
    as `veneer.places` reads it, or a list of them; None means the method's own default. `also_train` names modules
    (whole dotted endings) that are trained whole, in a copy. `dtype` is that of the adapter's weights: float32 unless
    the base is float64.

    All other parameters are frozen; `detach` restores the model. The base's keys, class and modules stay as they are.

    Raises NoSuchPlace, Overlap, UnreadableModel, MethodError or PlaceError, before the model is touched.
    """
    claims = claim(model, method, where, also_train=also_train, dtype=dtype)
    return install(model, name, claims, also_train)


def claim(
    model: nn.Module,
    method: Methods | Mapping[str, Methods],
    where: Where | None = None,
    *,
    also_train: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> list[Claim]:
    """Find the places, build the deltas and check them; nothing is changed on the model."""
    _refuse_sharded(model)
    if isinstance(also_train, str):
        raise PlaceError(f"also_train is a list of module names; write also_train=['{also_train}'].")
    pairs = _pairs(method, where) + [(_below(model, module), FullFineTuning()) for module in also_train]
    claims: list[Claim] = []
    while pairs:
        text, one = pairs.pop(0)
        found = one.select(places.find(model, text, one.unit))
        one.check(found)
        claims += build(one, found, text, dtype)
        pairs += list(one.companions(found))
    claims = _each_once(claims)
    _refuse_overlaps(claims, stacked=_stacked(method))
    return claims


def _below(model: nn.Module, module: str) -> str:
    """A `where` for everything below the modules of this name; NoSuchPlace where there is none with parameters."""
    pattern = rf"(.*\.)?{re.escape(module)}"
    paths = [path for path, _ in site.base_modules(model)]
    if not any(re.fullmatch(pattern, path) for path in paths):
        near = closest(module, paths)
        raise NoSuchPlace(f"No module of {type(model).__name__} matches '{module}' in also_train.{near}")
    return rf"re:{pattern}\..*"


@uncollected()
def build(
    method: Method, found: Sequence[Place], where: str, dtype: torch.dtype | None = None, filled: bool = False
) -> list[Claim]:
    """One method's deltas at these places, in the adapter's dtype; errors name the place.

    `filled` says that a file's tensors come next.
    """
    claims = []
    shared = method.share(found)
    if shared is not None and dtype is not None:
        shared.to(dtype)
    for place in found:
        place = dataclasses.replace(place, shared=shared, filled=filled)
        try:
            if method.unit in ("weight", "table"):
                place = dataclasses.replace(place, map=place.format.map(place.reader))
            delta = method.build(place)
            if delta.measures and not place.format.readable:
                place.read()  # which says why not
            if place.unit == "weight" and place.functional and not isinstance(delta, Weight):
                raise MethodError(
                    "it acts on a layer's activations, but the weight is read without a call of a layer. Leave it out "
                    "of `where`, or use a method with a weight form such as LoRA."
                )
            if delta.reads not in ("", *place.sources):
                raise MethodError(f"its {delta.reads} passes by no module that could be read. Name other places.")
            if place.spans is not None and isinstance(delta, Before):
                raise MethodError("the other roles of this fused projection read the same input. Name the whole layer.")
        except MethodError as error:
            raise MethodError(f"{type(method).__name__} at {place.path}: {error}") from None
        if dtype is not None:
            delta.to(dtype)
        for name, parameter in delta.named_parameters():
            parameter.requires_grad_(delta.trains(name))
        claims.append(Claim(where, method, place, delta))
    return claims


def _each_once(claims: Sequence[Claim]) -> list[Claim]:
    """Training a parameter whole twice is training it once: `bias="all"` and `also_train` may name the same one."""
    kept: list[Claim] = []
    whole: set[tuple[int, str]] = set()
    for one in claims:
        again = isinstance(one.method, FullFineTuning) and one.place.key in whole
        if isinstance(one.method, FullFineTuning):
            whole.add(one.place.key)
        if not again:
            kept.append(one)
    return kept


def _pairs(method: Methods | Mapping[str, Methods], where: Where | None) -> list[tuple[str, Method]]:
    """(where, method) of everything asked for."""
    if isinstance(method, Mapping):
        if where is not None:
            raise PlaceError("A mapping says where each method goes; leave `where` out, or pass one method.")
        return [pair for text, methods in method.items() for pair in _pairs(methods, text)]
    methods = method if isinstance(method, tuple) else (method,)
    for one in methods:
        if not isinstance(one, Method):
            raise MethodError(f"attach takes methods such as veneer.LoRA(rank=8), not {one!r}.")
    text = where if isinstance(where, str) or where is None else " | ".join(where)
    return [(one.default_where if text is None else text, one) for one in methods]


def _stacked(method: Methods | Mapping[str, Methods]) -> list[tuple[Method, ...]]:
    groups = method.values() if isinstance(method, Mapping) else [method]
    return [group for group in groups if isinstance(group, tuple)]


def _refuse_overlaps(claims: Sequence[Claim], stacked: Sequence[tuple[Method, ...]]) -> None:
    by_key: dict[tuple[int, str], list[Claim]] = {}
    for new in claims:
        others = by_key.setdefault(new.place.key, [])
        for old in others:
            together = any(old.method in group and new.method in group for group in stacked)
            if not together and old.place.overlaps(new.place):
                raise Overlap(
                    f"{type(old.method).__name__} (where='{old.where}') and {type(new.method).__name__} "
                    f"(where='{new.where}') both claim {new.place.path}. Pass a tuple to stack them, in order."
                )
        others.append(new)


def _refuse_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if sharding.shared_out(parameter):
            raise PlaceError(
                f"{name} is already sharded, and an adapter attached now would not be synchronised. Attach first, then "
                "call fully_shard."
            )


@uncollected()
def install(model: nn.Module, name: str, claims: Sequence[Claim], also_train: Sequence[str] = ()) -> Adapter:
    """Stand checked claims on the model under a name, freeze the rest, and make the adapter the active one."""
    state = state_of(model)
    places.check_name(model, name, list(state.adapters))
    if isinstance(model, nn.Sequential) and any(one.place.shared is not None for one in claims):
        raise PlaceError(
            "An nn.Sequential runs every child it has, and would run what places of this method share. Put it into a "
            "module of your own."
        )
    for one in claims:
        if site.CHILD in vars(one.place.reader)["_modules"] and site.of(one.place.reader) is None:
            raise PlaceError(f"{one.place.reader_path} has a child named '{site.CHILD}' of its own; rename it first.")
    if not state.adapters:
        passing = _make_differentiable(model)
        state.trainable = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
        model.requires_grad_(False)
        state.passing = passing
        checkpoints.begin(model)
    vars(model)[STATE] = state
    adapter = Adapter(name, model, claims, also_train)
    for one in claims:
        for place in (one.place, *one.place.tied):
            site.add(place, name, one.delta, state.routes)
    site.share(model, name, adapter.shared, state.routes)
    state.adapters[name] = adapter
    state.routes.order.append(name)
    activate(model, *state.routes.merged, name)
    torch.compiler.reset()
    return adapter


def _make_differentiable(model: nn.Module) -> list[RemovableHandle]:
    """See to it that gradients pass every quantized module, with an adapter or not; returns the hooks that it takes."""
    hooks = []
    for path, module in site.base_modules(model):
        form = formats.of(module)
        if form is not None and form.quantized:
            form.prepare(module)
            if not form.differentiable(module):
                hooks.append(site.pass_gradients(module, path, form))
    return hooks


def take_off(model: nn.Module, adapter: Adapter) -> None:
    """Remove an adapter's sites; what it merged stays."""
    state = state_of(model)
    for one in adapter.claims:
        for place in (one.place, *one.place.tied):
            site.remove(place.reader, adapter.name)
    site.remove(model, adapter.name)
    routes = state.routes
    routes.order.remove(adapter.name)
    routes.active = tuple(name for name in routes.active if name != adapter.name)
    if routes.rows is not None:
        routes.route(model, [[name for name in row if name != adapter.name] for row in routes.rows])
    del state.adapters[adapter.name]
    adapter.attached = False
    if not state.adapters:
        del vars(model)[STATE]
        for hook in state.passing:
            hook.remove()
        checkpoints.end(model)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(state.trainable.get(key, parameter.requires_grad))
    torch.compiler.reset()


def check(model: nn.Module, batch: Mapping[str, Any]) -> list[str]:
    """Run one batch and name the places whose adapter never ran: code went round the module they stand on.

    An empty list is good. The usual cause is code that reads a layer's `.weight` without calling the layer.
    """
    state = state_of(model)
    acting = {name for row in state.routes.rows or (state.routes.active,) for name in row} - set(state.routes.merged)
    active = [adapter for adapter in state.adapters.values() if adapter.name in acting]
    ran: set[int] = set()
    watched = [one for adapter in active for one in adapter.claims if one.place.path not in state.routes.dropped]
    hooks = [one.delta.register_forward_hook(lambda delta, args, y: ran.add(id(delta))) for one in watched]
    state.routes.look_again()
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
        state.routes.look_again()
    return [one.place.path for one in watched if id(one.delta) not in ran]
