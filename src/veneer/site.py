"""The mechanism: hooks on the base's own modules, through which adapters act.

A module that carries adapters gets one child, `adapters` (a `Site`), and hooks that call it. Nothing of the base is
wrapped, renamed or replaced, so its keys, attributes and class stay. The hooks are plain functions: they pickle by name
and a copied model finds its own site through the module they are called with.

A delta may read an activation that passes by another module (a bottleneck in parallel to a sublayer reads its input): a
hook there puts it into the binding's `Held`, from which the delta's own hook takes it.

A `Weight` delta is shown to the base by shadowing: for the time of one forward the changed tensor stands in the owner's
`__dict__`, which Python looks at before the registered parameters; a hook that runs on errors too takes it away again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.delta import After, Before, Delta, Input, Place, Source, Span, Weight, row_index
from veneer.errors import MethodError, PlaceError, RoutingError
from veneer.mixing import Group, Mix
from veneer.routes import Routes, repeated

CHILD = "adapters"
hooks_by_port: dict[type[Delta], Callable[[nn.Module, Site], list[RemovableHandle]]] = {}
"""What registers the hooks that a port needs beside this file's own; the seam that serves the port fills it in."""

_ANSWERED = After, Input
"""The ports at a module's answer."""

Rows = list[int] | None


class Held:
    """An activation between the module it passed by and the delta that reads it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.value: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds nothing: what passed by belongs to a forward of the original."""
        return {**vars(self), "value": None}

    def take(self) -> Tensor:
        """The activation, which is let go of."""
        value, self.value = self.value, None
        if value is None:
            raise PlaceError(
                f"No activation passed by {self.source.path} before it was read. Attach where code calls that module."
            )
        return value


@dataclass(frozen=True)
class Binding:
    """How one delta is bound to its site: what it changes, relative to the module that carries the site."""

    path: str
    owner: str
    parameter: str
    format: Any  # the place's own
    spans: tuple[Span, ...] | None
    item: int | str | None = None
    held: Held | None = None
    attends: tuple[int, ...] = ()
    """Shape of the keys and values of an attention in code of its own; empty where transformers' registry serves it."""
    sources: Mapping[str, Source] = field(default_factory=dict)
    ahead: bool = False
    """Whether it acts before the stack, by positions in front, and not on this module's answer."""


Acting = tuple[Delta, Binding, Rows]
"""A delta that acts now, how it is bound, and the rows it acts on (None: all)."""


class Site(nn.ModuleDict):
    """The adapters of one module: for each adapter's name the deltas it has here, in order."""

    def __init__(self, path: str, routes: Routes) -> None:
        super().__init__()
        self.path = path
        self.routes = routes
        self.bindings: dict[str, list[Binding]] = {}
        self.handles: list[RemovableHandle] = []
        self._known: tuple[Any, dict[Any, tuple[Acting, ...]]] = None, {}
        """What acts at each port while the same adapters act everywhere: to look takes longer than many a delta."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks for itself."""
        return {**vars(self), "_known": (None, {})}

    def deltas(self, port: type[Delta] | tuple[type[Delta], ...], batch: Tensor | None) -> Iterable[Acting]:
        """The deltas that act now at one port."""
        routes = self.routes
        if routes.rows is not None or torch.compiler.is_compiling():
            return self._acting(port, batch)
        now = routes.active, routes.merged, routes.dropped
        if self._known[0] != now:
            self._known = now, {}
        known = self._known[1]
        if port not in known:
            known[port] = tuple(self._acting(port, batch))
        return known[port]

    def _acting(self, port: type[Delta] | tuple[type[Delta], ...], batch: Tensor | None) -> Iterator[Acting]:
        routes, lists = self.routes, self._modules
        dropped = routes.dropped  # asked first: compiled code that looks at a path is for that one place alone
        for name in routes.order if routes.rows is not None else routes.active:
            if name not in lists:
                continue
            rows = routes.served(name, batch, self.path)
            if rows == []:
                continue
            for delta, binding in zip(cast(nn.ModuleList, lists[name]), self.bindings[name], strict=True):
                if isinstance(delta, port) and not (dropped and binding.path in dropped):
                    yield delta, binding, rows


def of(module: nn.Module) -> Site | None:
    """The site a module carries, if any."""
    child = module._modules.get(CHILD)
    return child if isinstance(child, Site) else None


def sites(model: nn.Module) -> Iterator[tuple[nn.Module, Site]]:
    """Every module of the model that carries a site."""
    for module in model.modules():
        site = of(module)
        if site is not None:
            yield module, site


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The base's own modules with their paths, each once; adapters are passed over."""
    inside = ""
    for path, module in model.named_modules():
        if isinstance(module, Site):
            inside = f"{path}."
        elif not (inside and path.startswith(inside)):
            yield path, module


def _made(module: nn.Module, path: str, name: str, routes: Routes) -> Site:
    """The module's site, with room for adapter `name`."""
    site = of(module)
    if site is None:
        site = Site(path, routes)
        module.add_module(CHILD, site.train(module.training))
    if name not in site:
        site[name] = nn.ModuleList()
        site.bindings[name] = []
    return site


def share(model: nn.Module, name: str, modules: Sequence[nn.Module], routes: Routes) -> None:
    """Register what places of adapter `name` share, once, at the root of the model."""
    for module in modules:
        site = _made(model, "", name, routes)
        cast(nn.ModuleList, site[name]).append(module)
        site.bindings[name].append(Binding("", "", "", None, None))
        site[name].train(model.training)


def add(place: Place, name: str, delta: Delta, routes: Routes) -> None:
    """Stand `delta` of adapter `name` at `place`."""
    site = _made(place.reader, place.reader_path, name, routes)
    cast(nn.ModuleList, site[name]).append(delta)
    site[name].train(place.reader.training)
    below = (path for path, module in place.reader.named_modules() if module is place.owner)
    held = Held(place.sources[delta.reads]) if delta.reads in place.sources else None
    attends = place.shape if place.unit == "attention" and place.functional else ()
    site.bindings[name].append(
        Binding(
            path=place.path,
            owner=next(below, ""),
            parameter=place.parameter,
            format=place.format,
            spans=place.spans,
            item=place.item,
            held=held,
            attends=attends,
            sources=place.sources,
            ahead=isinstance(delta, Input) and bool(delta.slots),
        )
    )
    _hook(place.reader, site)


def remove(module: nn.Module, name: str) -> None:
    """Take adapter `name` off one module; the last one takes site and hooks with it."""
    site = of(module)
    if site is None or name not in site:
        return
    del site[name], site.bindings[name]
    _hook(module, site)
    if not site:
        del module._modules[CHILD]


def _hook(module: nn.Module, site: Site) -> None:
    """Register exactly the hooks that the site's deltas need."""
    site._known = None, {}
    for handle in site.handles:
        handle.remove()
    kinds = [type(delta) for deltas in site.values() for delta in cast(nn.ModuleList, deltas)]
    site.handles = [
        handle
        for port, register in hooks_by_port.items()
        if any(issubclass(kind, port) for kind in kinds)
        for handle in register(module, site)
    ]
    site.handles += [
        binding.held.source.module.register_forward_pre_hook(
            functools.partial(_hold, routes=site.routes, name=name, binding=binding), with_kwargs=True, prepend=True
        )
        for name, bindings in site.bindings.items()
        for binding in bindings
        if binding.held
    ]
    if any(issubclass(kind, Weight) for kind in kinds):
        site.handles.append(module.register_forward_pre_hook(_shadow, with_kwargs=True))
    if any(issubclass(kind, Before) for kind in kinds):
        site.handles.append(module.register_forward_pre_hook(_before, with_kwargs=True))
    if any(issubclass(kind, _ANSWERED) for kind in kinds):
        site.handles.append(module.register_forward_hook(_after, with_kwargs=True))
    if any(issubclass(kind, Weight) for kind in kinds):  # last, so that an After delta sees what the module saw
        site.handles.append(module.register_forward_hook(_unshadow, always_call=True))


def pass_gradients(module: nn.Module, path: str, format: Any) -> RemovableHandle:
    """Let `format` see to the gradients that pass the module, ahead of its adapters, until the handle is removed."""
    return module.register_forward_hook(
        functools.partial(_through, path=path, format=format), with_kwargs=True, prepend=True
    )


def _through(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, path: str, format: Any
) -> Tensor:
    x = _first(args, kwargs)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return output
    try:
        return cast(Tensor, format.now(module).through(module, x, output))  # dense while something is merged
    except MethodError as error:
        raise MethodError(f"{path}: {error}") from None


def watch(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `see` with what the module is called with, until the handle is removed."""

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(_first(args, kwargs))

    return module.register_forward_pre_hook(look, with_kwargs=True)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The activation a module was called with: its first argument."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A tensor whose first dimension is the batch: the first that a module was called with, if any."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _hold(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routes: Routes, name: str, binding: Binding
) -> None:
    """Keep what a delta will read, where it will act: what nobody takes would stay in memory."""
    held = binding.held
    if held is not None and routes.serves(name, binding.path):
        key = held.source.key
        held.value = args[key] if isinstance(key, int) else kwargs[key]


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = _first(args, kwargs)
    for delta, _, rows in cast(Site, module.adapters).deltas(Before, x):
        x = delta(x) if rows is None else put(x, 0, rows, delta(take(x, 0, rows)))
    if args:
        return (x, *args[1:]), kwargs
    return (), {**kwargs, next(iter(kwargs)): x}


def _after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    site: Any = module._modules[CHILD]
    mix = site.routes.mix
    groups = None if mix is None else _grouped(site, mix)
    if mix is not None and groups is not None:
        x = _first(args, kwargs)
        repeats = repeated(len(mix.index), _batch(args, kwargs), site.path)
        for group in groups:
            y = output if group.item is None else output[group.item]
            columns = None if group.spans is None else row_index(group.spans, y.device)
            part = y if columns is None else y.index_select(-1, columns)
            part = group.add(mix, repeats, x, part)
            y = part if columns is None else y.index_copy(-1, columns, part)
            output = y if group.item is None else _replaced(output, group.item, y)
        return output
    for delta, binding, rows in site.deltas(_ANSWERED, None if site.routes.rows is None else _batch(args, kwargs)):
        if binding.ahead:
            continue
        x = binding.held.take() if binding.held else _first(args, kwargs)
        y = output if binding.item is None else output[binding.item]
        if rows is None:
            y = delta(x, y) if binding.spans is None else _columns(delta, x, y, binding.spans)
        else:
            y = put(y, 0, rows, _columns(delta, take(x, 0, rows), take(y, 0, rows), binding.spans))
        output = y if binding.item is None else _replaced(output, binding.item, y)
    return output


def _grouped(site: Site, mix: Mix) -> list[Group] | None:
    """What serves the rows together here; None where each delta serves its own rows."""
    if torch.compiler.is_compiling():
        return _groups(site, mix.able)  # whoever acts now: the graph must not depend on it
    return None if mix.uniform else mix.groups(site.path, site.training, lambda: _groups(site, mix.acting))


def _groups(site: Site, names: Sequence[str]) -> list[Group] | None:
    """The deltas of these adapters by what they change, where all that act after the module offer a pair; else None."""
    groups: dict[tuple[Any, ...], Group] = {}
    for name in names:
        if name not in site.bindings:
            continue
        for delta, binding in zip(cast(nn.ModuleList, site[name]), site.bindings[name], strict=True):
            if not isinstance(delta, _ANSWERED) or binding.ahead or binding.path in site.routes.dropped:
                continue
            if not isinstance(delta, After) or binding.held or _watched(delta) or delta.pair() is None:
                return None
            group = groups.setdefault((binding.spans, binding.item), Group(binding.spans, binding.item))
            group.members.setdefault(name, []).append(delta)
    return list(groups.values())


def _watched(delta: Delta) -> bool:
    """Whether something hangs on the delta's call, which moves its tensors or looks whether it runs."""
    return bool(delta._forward_hooks or delta._forward_pre_hooks or "forward" in vars(delta))


def _replaced(output: Any, item: int | str, y: Tensor) -> Any:
    """A module's output of several things with one of them changed."""
    if isinstance(item, str):
        output[item] = y
        return output
    changed = [*output[:item], y, *output[item + 1 :]]
    return changed if isinstance(output, list) else tuple(changed)  # the base may go on to add to the list


def _columns(delta: Delta, x: Tensor, y: Tensor, spans: Sequence[Span] | None) -> Tensor:
    """delta(x, y), where y is only the columns of `spans`."""
    if spans is None:
        return cast(Tensor, delta(x, y))
    columns = row_index(spans, y.device)
    return y.index_copy(-1, columns, delta(x, y.index_select(-1, columns)))


def take(x: Tensor, dim: int, rows: list[int]) -> Tensor:
    """These rows of x."""
    return x.index_select(dim, torch.tensor(rows, device=x.device))


def put(x: Tensor, dim: int, rows: list[int], new: Tensor) -> Tensor:
    """x with `new` in place of these rows."""
    return x.index_copy(dim, torch.tensor(rows, device=x.device), new)


def _shadow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    site = cast(Site, module.adapters)
    for delta, binding, rows in site.deltas(Weight, _batch(args, kwargs)):
        if rows is not None:
            raise RoutingError(
                f"{binding.path} is changed as a weight, which every row of a batch shares, so rows cannot differ "
                "there. Run the rows apart, or leave this place out of the adapter."
            )
        owner = module.get_submodule(binding.owner)
        form, device = binding.format.now(owner), cast(Tensor, owner._parameters[binding.parameter]).device
        outputs = None if binding.spans is None else row_index(binding.spans, device)
        pair = None if not form.quantized or _watched(delta) else cast(Weight, delta).pair()
        owner.__dict__[binding.parameter] = form.changed(owner, binding.parameter, delta, outputs, pair)


def _unshadow(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    for bindings in cast(Site, module.adapters).bindings.values():
        for binding in bindings:
            module.get_submodule(binding.owner).__dict__.pop(binding.parameter, None)
