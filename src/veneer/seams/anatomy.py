"""What is where in a model, read off its data flow: no table of names, no code for any one architecture.

- A residual add is an add of two equal shapes, one operand an ancestor of the other with a weight or an attention
  between.
- A sublayer is what lies between; with an attention in it it is attention, otherwise an MLP.
- q, k and v are the nearest weights behind an attention's operands, o the nearest after it. Where one weight serves
  several of them, random numbers sent through the recorded calls tell which of its output rows each role gets.
- Attention is cross-attention where its keys do not descend from the sublayer's input.
- An MLP's down projection is its last weight. Where two products meet in a multiplication, the one that passed a
  nonlinearity is the gate and the other is up; otherwise the first weights are up.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer import formats, site
from veneer.delta import Span
from veneer.errors import UnreadableModel
from veneer.seams import ends, probe
from veneer.seams.ends import Ends
from veneer.seams.trace import PRODUCTS as MATMULS
from veneer.seams.trace import Graph, Node, Tracer
from veneer.seams.transformers import is_pretrained, observed_attention

ADDS = {"add", "__add__", "__radd__", "__iadd__", "add_"}
PRODUCTS = {"mul", "__mul__", "__rmul__", "__imul__", "mul_"}
VIEWS = {
    "view",
    "reshape",
    "chunk",
    "split",
    "unbind",
    "__getitem__",
    "transpose",
    "permute",
    "contiguous",
    "to",
    "flatten",
}


@dataclass(frozen=True)
class Part:
    """A parameter, or the output rows of it that `spans` name."""

    parameter: str
    spans: tuple[Span, ...] | None = None


@dataclass
class Sublayer:
    """One branch beside the residual stream: its kind, the module that attends (if any), and its weights by role."""

    kind: str
    module: str
    registered: bool = False
    """Attends through transformers' registry, where keys and values can be reached."""
    heads: tuple[int, ...] = ()
    """Key and value heads, width of a key, width of a value, where it is `registered`."""
    roles: dict[str, list[Part]] = field(default_factory=dict)
    ends: Ends = field(default_factory=Ends)


@dataclass(frozen=True)
class Anatomy:
    """The sublayers of a model in the order of its forward."""

    sublayers: tuple[Sublayer, ...]
    tables: tuple[str, ...] = ()
    """The embeddings that token ids are looked up in."""

    @functools.cached_property
    def full(self) -> set[str]:
        """The repeated blocks that hold sublayers of two kinds."""
        kinds: dict[str, set[str]] = {}
        for sublayer in self.sublayers:
            for block in sublayer.ends.blocks:
                kinds.setdefault(block, set()).add(sublayer.kind)
        return {block for block, held in kinds.items() if len(held) > 1}

    def layer(self, blocks: Sequence[str]) -> int:
        """The number of the innermost full block among these around a module, the outermost first; -1 for none."""
        last = ([block for block in blocks if block in self.full] or blocks)[-1:]
        return int(last[0].rpartition(".")[2]) if last else -1

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


def read(model: nn.Module) -> Anatomy:
    """The anatomy of a transformers model, traced once. Raises UnreadableModel with what stood in the way."""
    if not is_pretrained(model):
        raise UnreadableModel(
            f"{type(model).__name__} is no transformers model, so its roles cannot be read. Name the modules by a "
            "glob, such as where='*.q_proj'."
        )
    if model not in _CACHE:
        _CACHE[model] = _sublayers(_trace(model), repeated(model))
    return _CACHE[model]


def layer(model: nn.Module, path: str) -> int:
    """The number of the block that the module of this path lies in, -1 outside the blocks."""
    around = sorted((block for block in repeated(model) if f"{path}.".startswith(f"{block}.")), key=len)
    try:
        return read(model).layer(around)
    except UnreadableModel:
        return Anatomy(()).layer(around[:1])


def _trace(model: nn.Module) -> Graph:
    try:
        inputs = {name: tensor.to("meta") for name, tensor in probe.inputs(model).items()}
        meta = {name: _meta(tensor) for name, tensor in _tensors(model).items()}
        tracer = Tracer(
            model, {name: tensor for name, tensor in meta.items() if isinstance(tensor, nn.Parameter)}, inputs
        )
        with torch.no_grad(), _at_rest(model), _unpacked(model), observed_attention(tracer.attention), tracer:
            torch.func.functional_call(model, meta, kwargs={**inputs, "use_cache": False} if _caches(model) else inputs)
    except Exception as error:
        raise UnreadableModel(
            f"The roles of {type(model).__name__} could not be read: a probe forward stopped with "
            f"{type(error).__name__}: {error}. Name the modules by a glob instead, such as where='*.q_proj'."
        ) from error
    return tracer.graph


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; a packed weight in the shape it stands for."""
    packed = {
        f"{path}.weight": nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        for path, _, shape in _packed_modules(model)
    }
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **packed}


def _packed_modules(model: nn.Module) -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """The quantized linears: path, module and logical shape of its weight."""
    found = []
    for path, module in model.named_modules():
        form, weight = formats.of(module), module._parameters.get("weight")
        if form is not None and weight is not None:
            shape = form.shape(module, "weight")
            if not weight.is_floating_point() or weight.numel() != math.prod(shape):
                found.append((path, module, shape))
    return found


@contextmanager
def _unpacked(model: nn.Module) -> Iterator[None]:
    """Within, quantized linears multiply by a plain weight: their own kernels cannot run without numbers."""
    linears = [module for _, module, _ in _packed_modules(model)]
    for module in linears:
        module.__dict__["forward"] = functools.partial(_multiply, module)
    try:
        yield
    finally:
        for module in linears:
            del module.__dict__["forward"]


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Within, the base runs alone: what an adapter adds is no part of the model's anatomy."""
    routes = next((here.routes for _, here in site.sites(model)), site.Routes())
    before = routes.active, routes.rows
    routes.active, routes.rows = (), None
    try:
        yield
    finally:
        routes.active, routes.rows = before


def _multiply(module: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.weight)


def _meta(tensor: Tensor) -> Tensor:
    """A stand-in with the same shape; one dtype for all, so that no cast comes between."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty_like(tensor, device="meta", dtype=dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _caches(model: Any) -> bool:
    return "use_cache" in vars(model.config) or "use_cache" in dir(type(model.config))


def repeated(model: nn.Module) -> list[str]:
    """Paths of the repeated blocks: the items of every ModuleList of the base."""
    return [
        f"{path}.{name}".removeprefix(".")
        for path, module in site.base_modules(model)
        if isinstance(module, nn.ModuleList)
        for name, _ in module.named_children()
    ]


def _sublayers(graph: Graph, blocks: list[str]) -> Anatomy:
    found: list[Sublayer] = []
    seen: set[tuple[str, str]] = set()
    for add, stream, branch in _residuals(graph):
        sublayer = _attention(graph, stream, branch) or _mlp(graph, stream, branch)
        sublayer.ends = ends.find(graph, add, stream, branch, blocks)
        key = (sublayer.kind, str(sorted((k, str(v)) for k, v in sublayer.roles.items())))
        if key not in seen:
            seen.add(key)
            found.append(sublayer)
    return Anatomy(tuple(found), _tables(graph))


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


def _residuals(graph: Graph) -> list[tuple[int, int, int]]:
    """(add, stream, branch) of each residual add; an add across whole sublayers is none."""
    found: list[tuple[int, int, int]] = []
    base: dict[int, int] = {}
    for node in graph.nodes:
        operands = [i for i in node.inputs if graph.nodes[i].shape == node.shape and graph.nodes[i].op != "parameter"]
        if node.op not in ADDS or len(operands) != 2:
            continue
        for stream, branch in (operands, operands[::-1]):
            while not graph.reaches(stream, branch) and stream in base:
                stream = base[stream]
            if graph.reaches(stream, branch) and any(n.is_weight or n.core for n in graph.between(stream, branch)):
                base[node.index] = stream
                found += [(node.index, stream, end) for end in _split(graph, stream, branch)]
                break
    adds = {index for index, _, _ in found}
    return [(a, s, b) for a, s, b in found if not adds & {n.index for n in graph.between(s, b)}]


def _split(graph: Graph, stream: int, branch: int) -> list[int]:
    """The two branches of a parallel block, x + attention(x) + mlp(x), where their sum is taken first."""
    node = graph.nodes[branch]
    ends = [i for i in node.inputs if graph.reaches(stream, i)]
    if node.op not in ADDS or len(ends) != 2 or graph.reaches(*ends) or graph.reaches(*ends[::-1]):
        return [branch]
    if not all(any(n.is_weight for n in graph.between(stream, end)) for end in ends):
        return [branch]
    return [part for end in ends for part in _split(graph, stream, end)]


def _attention(graph: Graph, stream: int, branch: int) -> Sublayer | None:
    inside = graph.between(stream, branch)
    core = next((node for node in inside if node.core), None) or _written_out(graph, inside)
    if core is None or core.core is None:
        return None
    cross = not (graph.reaches(stream, core.core[1]) or stream == core.core[1])
    sublayer = Sublayer("cross_attention" if cross else "attention", core.module, core.op == "attention")
    if sublayer.registered:
        keys, values = (graph.nodes[i].shape for i in core.core[1:])
        sublayer.heads = (keys[1], keys[3], values[3])
    if core.is_weight:
        sublayer.roles = _packed(core, graph)
        return sublayer
    for role, operand in zip("qkv", core.core, strict=True):
        sublayer.roles[role] = _parts(graph, operand)
    after = [node for node in inside if node.is_weight and graph.reaches(core.index, node.index)]
    nearest = [node for node in after if not any(graph.reaches(other.index, node.index) for other in after)]
    sublayer.roles["o"] = [Part(node.parameters[0]) for node in nearest]
    return sublayer


def _written_out(graph: Graph, inside: list[Node]) -> Node | None:
    """Attention in a model's own code: data @ data, softmax, data @ data. The last product stands for it all."""
    softmax = next((node for node in inside if node.op == "softmax"), None)
    products = [node for node in inside if node.op in MATMULS and not node.is_weight and len(node.inputs) >= 2]
    scores = [node for node in products if softmax and graph.reaches(node.index, softmax.index)]
    mixed = [node for node in products if softmax and graph.reaches(softmax.index, node.index)]
    if softmax is None or not scores or not mixed:
        return None
    q, k = scores[-1].inputs[-2:]
    v = next(i for i in mixed[0].inputs if i != softmax.index and not graph.reaches(softmax.index, i))
    return replace(mixed[0], core=(q, k, v))


def _packed(core: Node, graph: Graph) -> dict[str, list[Part]]:
    """nn.MultiheadAttention: one call holds the projections; q, k and v are thirds of in_proj_weight or their own."""
    matrices = [p for p in core.parameters if p.endswith("weight")]
    (out,) = (p for p in matrices if p.endswith("out_proj.weight"))
    width = core.shape[-1]
    fused = [p for p in matrices if p.endswith("in_proj_weight")]
    if fused:
        roles = {r: [Part(fused[0], ((i * width, (i + 1) * width),))] for i, r in enumerate("qkv")}
    else:
        roles = {r: [Part(p) for p in matrices if p.endswith(f"{r}_proj_weight")] for r in "qkv"}
    return {**roles, "o": [Part(out)]}


def _parts(graph: Graph, operand: int) -> list[Part]:
    """The weights nearest behind a node, each with the rows that reach it."""
    return [Part(node.parameters[0], _spans(graph, node, operand)) for node in graph.weights_behind(operand)]


def _spans(graph: Graph, weight: Node, operand: int) -> tuple[Span, ...] | None:
    if weight.index == operand:
        return None
    reached = graph.replay(weight.index, operand).int()
    if reached.all():
        return None
    edges = torch.diff(reached, prepend=reached.new_zeros(1), append=reached.new_zeros(1)).nonzero().flatten().tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _mlp(graph: Graph, stream: int, branch: int) -> Sublayer:
    inside = graph.between(stream, branch)
    weights = [node for node in inside if node.is_weight]
    last = [w for w in weights if not any(graph.reaches(w.index, other.index) for other in weights)]
    sublayer = Sublayer("mlp", last[-1].module, roles={"down": [Part(w.parameters[0]) for w in last]})
    for node in inside:
        gated = _gate(graph, stream, node) if node.op in PRODUCTS else None
        if gated:
            sublayer.roles = {"gate": gated[0], "up": gated[1], **sublayer.roles}
            return sublayer
    first = [w for w in weights if w not in last and not any(graph.reaches(o.index, w.index) for o in weights)]
    return Sublayer("mlp", sublayer.module, roles={"up": [Part(w.parameters[0]) for w in first], **sublayer.roles})


def _gate(graph: Graph, stream: int, product: Node) -> tuple[list[Part], list[Part]] | None:
    """(gate, up) where a multiplication joins two different projections."""
    sides = [i for i in product.inputs if graph.reaches(stream, i)]
    if len(sides) != 2:
        return None
    behind = [graph.weights_behind(side) for side in sides]
    if not all(len(weights) == 1 and graph.reaches(stream, weights[0].index) for weights in behind):
        return None
    parts = [_parts(graph, side) for side in sides]
    if parts[0] == parts[1] or (behind[0] == behind[1] and any(part[0].spans is None for part in parts)):
        return None
    bends = [sum(n.op not in VIEWS for n in graph.between(w[0].index, side)) if w[0].index != side else 0
             for w, side in zip(behind, sides, strict=True)]  # fmt: skip
    return (parts[0], parts[1]) if bends[0] > bends[1] else (parts[1], parts[0])
