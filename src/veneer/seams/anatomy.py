"""What is where in a model, read off its data flow: no table of names, no code for any one architecture.

One probe forward is traced (`trace`) into a graph (`graph`); its residual adds (`residuals`) part it into branches, and
each branch shows its roles (`roles`) and where its ends can be reached (`ends`). Two kinds of part have no residual add
of their own: an attention that stands alone, and the children of a block that mixes its streams in another way.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer import site
from veneer.errors import UnreadableModel
from veneer.routes import Routes
from veneer.seams import ends, packed, probe, residuals, roles
from veneer.seams.ends import Ends
from veneer.seams.graph import Graph
from veneer.seams.roles import VIEWS, Part, Roles
from veneer.seams.trace import Tracer
from veneer.seams.transformers import checkpointed, is_pretrained, observed_attention


@dataclass
class Sublayer(Roles):
    """One branch beside the residual stream, and where it can be reached.

    `registered`: it attends through transformers' registry, where keys and values can be reached; `heads` are then the
    number of key and value heads, the width of a key and the width of a value.
    """

    ends: Ends = field(default_factory=Ends)


@dataclass(frozen=True)
class Anatomy:
    """The sublayers of a model in the order of its forward."""

    sublayers: tuple[Sublayer, ...]
    tables: tuple[str, ...] = ()
    """The embeddings that token ids are looked up in."""
    read_from_outside: frozenset[str] = frozenset()
    """The modules whose weight is multiplied by code of another module, which never calls them (Mamba's `dt_proj`)."""

    @functools.cached_property
    def full(self) -> set[str]:
        """The repeated blocks that hold sublayers of two kinds."""
        kinds: dict[str, set[str]] = {}
        for sublayer in self.sublayers:
            for block in sublayer.ends.blocks:
                kinds.setdefault(block, set()).add(sublayer.kind)
        return {block for block, held in kinds.items() if len(held) > 1}

    def block(self, blocks: Sequence[str]) -> str:
        """The innermost full block among these around a module, the outermost first; or the innermost; or none."""
        return next(iter(([block for block in blocks if block in self.full] or blocks)[-1:]), "")

    def layer(self, blocks: Sequence[str]) -> int:
        """The number of that block; -1 for none."""
        block = self.block(blocks)
        return int(block.rpartition(".")[2]) if block else -1

    def parts(self, role: str) -> list[tuple[str, Part]]:
        """(short role, part) for `attention`, `mlp`, `attention.q`, `cross_attention.v`, ...; empty for none."""
        kind, _, short = role.partition(".")
        return [
            (name, part)
            for sublayer in self.sublayers
            if sublayer.kind == kind
            for name, parts in sublayer.roles.items()
            if short in ("", name)
            for part in parts
        ]


_CACHE: weakref.WeakKeyDictionary[nn.Module, Anatomy] = weakref.WeakKeyDictionary()


def read(model: nn.Module, example: Mapping[str, Tensor] | None = None) -> Anatomy:
    """The anatomy of a transformers model, traced once; `example` is a batch to trace with, where none can be guessed.

    Raises UnreadableModel with what stood in the way.
    """
    if not is_pretrained(model):
        raise UnreadableModel(
            f"{type(model).__name__} is no transformers model, so its roles cannot be read. Name the modules by a "
            "glob, such as where='*.q_proj'."
        )
    if model not in _CACHE or example is not None:
        _CACHE[model] = analyse(_trace(model, example), repeated(model), checkpointed(model))
    return _CACHE[model]


def adopt(model: nn.Module, anatomy: Anatomy) -> None:
    """Take the anatomy of another model of the same config for this one's, which saves a trace."""
    _CACHE[model] = anatomy


def read_from_outside(model: nn.Module) -> frozenset[str]:
    """Those of the model's anatomy; none where it cannot be read."""
    try:
        return read(model).read_from_outside
    except UnreadableModel:
        return frozenset()


def layers(model: nn.Module, paths: Iterable[str]) -> dict[str, int]:
    """The number of the block that each of these modules lies in, -1 outside the blocks.

    Where the model cannot be read, blocks inside blocks count for nothing.
    """
    blocks = repeated(model)
    above = {path: residuals.around(path, blocks) for path in paths}
    try:
        anatomy = read(model)
        return {path: anatomy.layer(around) for path, around in above.items()}
    except UnreadableModel:
        return {path: Anatomy(()).layer(around[:1]) for path, around in above.items()}


def _trace(model: nn.Module, example: Mapping[str, Tensor] | None) -> Graph:
    """The graph of the first probe that the model accepts: without numbers, or where it asks for some, with them."""
    real = not any(parameter.is_meta for parameter in model.parameters())
    failure: tuple[Exception, Tracer] | None = None
    for trace in (_trace_shapes, _trace_numbers) if real else (_trace_shapes,):
        for inputs in probe.candidates(model) if example is None else [dict(example)]:
            tracer = Tracer(model)
            try:
                with torch.no_grad(), at_rest(model), observed_attention(tracer.attention):
                    trace(model, inputs, tracer)
            except Exception as error:
                failure = failure or (error, tracer)
            else:
                return tracer.graph
    stopped = "no input could be guessed from its config"
    if failure:
        stop, tracer = failure
        reason = next(iter(str(stop).splitlines()), "")
        far = f"after {len(tracer.graph.nodes)} tensors, in {tracer.last or 'the model itself'}"
        stopped = f"a probe forward stopped with {type(stop).__name__}: {reason}, {far}"
    raise UnreadableModel(
        f"The roles of {type(model).__name__} could not be read: {stopped}. Hand over a batch that the model accepts, "
        "veneer.seams.anatomy.read(model, example=batch), or name the modules by a glob, such as where='*.q_proj'."
    ) from (failure[0] if failure else None)


def _trace_shapes(model: nn.Module, inputs: dict[str, Tensor], tracer: Tracer) -> None:
    """Trace with meta tensors in the place of parameters."""
    inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    meta, weights = packed.tensors(model)
    named = {**meta, **weights}
    tracer.start({name: tensor for name, tensor in named.items() if isinstance(tensor, nn.Parameter)}, inputs)
    with packed.unpacked(model, weights), tracer:
        torch.func.functional_call(model, meta, kwargs={**inputs, **_without_cache(model)})


def _trace_numbers(model: Any, inputs: dict[str, Tensor], tracer: Tracer) -> None:
    """Trace the model as it is; nothing of it changes."""
    dtype, device = model.dtype, model.device
    inputs = {name: t.to(device, dtype if t.is_floating_point() else None) for name, t in inputs.items()}
    training = [module for module in model.modules() if module.training]
    tracer.start(dict(model.named_parameters()), inputs)
    try:
        for module in training:
            module.training = False
        with torch.random.fork_rng([device] if device.type == "cuda" else []), tracer:
            model(**inputs, **_without_cache(model))
    finally:
        for module in training:
            module.training = True


def _without_cache(model: Any) -> dict[str, bool]:
    caches = "use_cache" in vars(model.config) or "use_cache" in dir(type(model.config))
    return {"use_cache": False} if caches and probe.accepts(model, "use_cache") else {}


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within, the base runs alone: what an adapter adds is no part of the model's anatomy."""
    routes = next((here.routes for _, here in site.sites(model)), Routes())
    before = routes.active, routes.rows, routes.mix
    routes.active, routes.rows, routes.mix = (), None, None
    try:
        yield
    finally:
        routes.active, routes.rows, routes.mix = before


def repeated(model: nn.Module) -> list[str]:
    """Paths of the repeated blocks: the items of every ModuleList of the base."""
    return [
        f"{path}.{name}".removeprefix(".")
        for path, module in site.base_modules(model)
        if isinstance(module, nn.ModuleList)
        for name, _ in module.named_children()
    ]


def outermost(model: nn.Module) -> list[str]:
    """Paths of the repeated blocks that lie in no other."""
    paths = repeated(model)
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def analyse(graph: Graph, blocks: list[str], whole: list[str]) -> Anatomy:
    """The anatomy that a graph shows; `whole` are the blocks that gradient checkpointing recomputes."""
    found: list[Sublayer] = []
    for branch in residuals.find(graph, blocks):
        where = ends.find(graph, branch, blocks)
        found += [_sublayer(one, where) for one in roles.of(graph, branch)]
    reached = {block for one in found if one.ends.output for block in one.ends.blocks}
    children = _children(graph, blocks, [path for path in whole if path not in reached])
    instead = {block for one in children for block in one.ends.blocks}
    found = [one for one in found if not instead & set(one.ends.blocks)] + children
    seen = {one.module for one in found}
    for core in graph.nodes:
        if core.core and core.module not in seen:
            alone = Ends(blocks=residuals.around(core.module, blocks))
            found.append(_sublayer(roles.attention(graph, core, (), None), alone))
    unique = {(one.kind, one.ends.output, str(sorted(one.roles.items(), key=str))): one for one in reversed(found)}
    multiplied = {(path.rpartition(".")[0], n.module) for n in graph.nodes if n.is_weight for path in n.parameters}
    outside = frozenset(owner for owner, module in multiplied if owner != module)
    return Anatomy(tuple(reversed(unique.values())), _tables(graph), outside)


def _sublayer(one: Roles, where: Ends) -> Sublayer:
    return Sublayer(one.kind, one.module, one.registered, one.heads, one.roles, where)


def _children(graph: Graph, blocks: list[str], whole: list[str]) -> list[Sublayer]:
    """The children of blocks without plain residual adds: each that attends, or multiplies twice, is a sublayer."""
    found = []
    for path in dict.fromkeys(call.path for call in graph.calls):
        parent = path.rpartition(".")[0]
        if parent not in whole and parent.rpartition(".")[0] not in whole:
            continue
        if parent not in whole and parent not in [b.rpartition(".")[0] for b in blocks]:
            continue
        inside = [n for n in graph.nodes if f"{n.module}.".startswith(f"{path}.")]
        where = ends.of_module(graph, path, blocks)
        if not where.output or sum(n.is_weight for n in inside) + 2 * sum(n.core is not None for n in inside) < 2:
            continue
        start, end = where.sources["input"], where.output
        call = next(call for call in graph.calls if call.path == path)
        branch = residuals.Branch(path, call.inputs[start[1]], call.outputs[end[1]])
        if graph.reaches(branch.stream, branch.end):
            found += [_sublayer(one, where) for one in roles.of(graph, branch)]
    return found


def _tables(graph: Graph) -> tuple[str, ...]:
    """Modules that look up token ids as they came: positions and types are computed, ids are only reshaped."""
    ids: set[int] = set()
    tables: dict[str, None] = {}
    for node in graph.nodes:
        if node.op.endswith("input_ids") or (node.op in VIEWS and ids.issuperset(node.inputs) and node.inputs):
            ids.add(node.index)
        elif node.op == "embedding" and ids & set(node.inputs):
            tables[node.module] = None
    return tuple(tables)
