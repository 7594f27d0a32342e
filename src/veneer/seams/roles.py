"""The weights of one branch beside the residual stream, by the role they play there.

- A branch with an attention in it is attention; its q, k and v are the nearest weights behind the attention's operands,
  o the nearest after it. Where one weight serves several of them, random numbers sent through the recorded calls tell
  which of its output rows each role gets.
- Attention is cross-attention where its keys do not descend from the stream.
- A branch that mixes positions otherwise (convolution, recurrence) is a mixer; all others are MLPs.
- An MLP's down projections are its last weights. Where two products meet in a multiplication and go on into another
  weight, the one that passed a nonlinearity is the gate and the other is up; otherwise the first weights are up.
- A router, whose numbers choose among experts, plays no role; nor does a weight that makes one number a position.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from veneer.delta import Span
from veneer.seams.graph import Graph, Node
from veneer.seams.residuals import MULTIPLICATIONS, Branch
from veneer.seams.trace import CONVOLUTIONS, FUSED_ATTENTION, PRODUCTS

VIEWS = {"view", "reshape", "chunk", "split", "unbind", "__getitem__", "transpose", "permute", "contiguous", "to",
         "flatten", "unsqueeze", "squeeze", "split_with_sizes", "unflatten"}  # fmt: skip
_SOFTMAX = {"softmax", "_softmax", "softmax_"}
_CHOICES = {"topk", "argmax", "gather"}
_SCANS = {"cumsum", "cumprod", "logcumsumexp", "fft", "fftn", "rfft", "fft_fft", "fft_fftn", "fft_rfft", "roll", "lstm"}


@dataclass(frozen=True)
class Part:
    """A parameter, or the output rows of it (of each expert, where it holds several) that `spans` name."""

    parameter: str
    spans: tuple[Span, ...] | None = None


@dataclass
class Roles:
    """What a branch is, the module that attends or multiplies last, and its weights by role."""

    kind: str
    module: str
    registered: bool = False
    heads: tuple[int, ...] = ()
    roles: dict[str, list[Part]] = field(default_factory=dict)


def of(graph: Graph, branch: Branch) -> list[Roles]:
    """The roles in a branch: one entry an attention, or one for an MLP or a mixer."""
    inside = graph.between(branch.stream, branch.end)
    cores = [node for node in inside if node.core] or _written_out(graph, branch, inside)
    if cores:
        spine = (branch.stream, *branch.spine)
        return [attention(graph, core, spine, branch.end) for core in cores]
    return [_mixer(graph, inside) or _mlp(graph, branch, inside)]


def attention(graph: Graph, core: Node, spine: tuple[int, ...], end: int | None) -> Roles:
    """The roles around one attention, in a branch that ends at `end`, or alone."""
    assert core.core is not None
    keys = core.core[1]
    own = any(stream == keys or graph.reaches(stream, keys) for stream in spine) if spine else _one_source(graph, core)
    found = Roles("attention" if own else "cross_attention", core.module, core.op == "attention")
    if not core.is_weight:
        found.heads = _heads(graph, core)
    if core.is_weight:
        found.roles = _packed(core)
        return found
    for role, operand in zip("qkv", core.core, strict=True):
        found.roles[role] = _parts(graph, operand)
    last = graph.nodes[-1].index if end is None else end
    after = [n for n in graph.nodes[core.index + 1 : last + 1] if n.is_weight and graph.reaches(core.index, n.index)]
    if end is None:
        after = after[:1]
    after = [n for n in after if n.index == end or end is None or graph.reaches(n.index, end)]
    found.roles["o"] = _whole([n for n in after if not any(graph.reaches(other.index, n.index) for other in after)])
    return found


def _heads(graph: Graph, core: Node) -> tuple[int, ...]:
    """Key heads and widths from the shapes of an attention's operands; a model's own code has keys as columns."""
    assert core.core is not None
    q, k, v = (graph.nodes[i].shape for i in core.core)
    if core.op == "attention" or core.op in FUSED_ATTENTION:
        return (k[1], k[3], v[3])
    if not len(q) == len(k) == len(v) or len(k) not in (3, 4) or q[-1] != k[-2] or k[-1] != v[-2]:
        return ()
    batch = graph.nodes[0].shape[0]
    return (k[1] if len(k) == 4 else k[0] // batch, k[-2], v[-1])


def _one_source(graph: Graph, core: Node) -> bool:
    """Whether queries and keys of an attention without a stream are made of the same numbers."""
    assert core.core is not None
    q, k = ({i for weight in graph.weights_behind(operand) for i in graph.data(weight)} for operand in core.core[:2])
    return bool(q & k)


def _written_out(graph: Graph, branch: Branch, inside: list[Node]) -> list[Node]:
    """Attention in a model's own code: data @ data, softmax, data @ data. The last product stands for it all."""
    products = [n for n in inside if n.op in PRODUCTS and not n.is_weight and len(graph.data(n)) >= 2]
    for softmax in (node for node in inside if node.op in _SOFTMAX):
        scores = [n for n in products if graph.reaches(n.index, softmax.index)]
        mixed = [n for n in products if graph.reaches(softmax.index, n.index)]
        if scores and mixed:
            q, k = graph.data(scores[0])[-2:]
            past = [i for i in graph.data(mixed[0]) if i != softmax.index and not graph.reaches(softmax.index, i)]
            if past:
                return [replace(mixed[0], core=(q, k, past[0]))]
    return []


def _packed(core: Node) -> dict[str, list[Part]]:
    """nn.MultiheadAttention: one call holds the projections; q, k and v are thirds of in_proj_weight or their own."""
    matrices = [p for p in core.parameters if p.endswith("weight")]
    width = core.shape[-1]
    fused = [p for p in matrices if p.endswith("in_proj_weight")]
    if fused:
        roles = {r: [Part(fused[0], ((i * width, (i + 1) * width),))] for i, r in enumerate("qkv")}
    else:
        roles = {r: [Part(p) for p in matrices if p.endswith(f"{r}_proj_weight")] for r in "qkv"}
    return {**roles, "o": [Part(p) for p in matrices if p.endswith("out_proj.weight")]}


def _whole(weights: list[Node]) -> list[Part]:
    return list(dict.fromkeys(Part(parameter) for weight in weights for parameter in weight.parameters))


def _parts(graph: Graph, operand: int) -> list[Part]:
    """The weights nearest behind a node, each with the rows that reach it."""
    found = [
        Part(parameter, _spans(graph, weight, operand))
        for weight in graph.weights_behind(operand)
        for parameter in weight.parameters
    ]
    return list(dict.fromkeys(found))


def _spans(graph: Graph, weight: Node, operand: int) -> tuple[Span, ...] | None:
    if weight.index == operand or weight.op in CONVOLUTIONS or weight.call is None:
        return None
    try:
        reached = graph.replay(weight.index, operand).int()
    except (RuntimeError, TypeError, IndexError, AssertionError):  # a call that random numbers cannot repeat
        return None
    if reached.all():
        return None
    edges = torch.diff(reached, prepend=reached.new_zeros(1), append=reached.new_zeros(1)).nonzero().flatten().tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _mixer(graph: Graph, inside: list[Node]) -> Roles | None:
    """A branch whose positions meet without an attention: convolution along them, a scan, products of its own data."""
    weights = [node for node in inside if node.is_weight]
    if any(len(shape) == 3 for w in weights for shape in _matrices(graph, w)) and not any(
        w.op in CONVOLUTIONS for w in weights
    ):
        return None  # experts: their products and sums are of rows sorted by expert, not of positions
    ends = {weights[0].index, weights[-1].index} if weights else set()
    meets = [
        node
        for node in inside
        if node.op in _SCANS
        or (node.op in PRODUCTS and not node.is_weight and len(graph.data(node)) >= 2)
        or (_slides(graph, node) and (node.op == "conv1d" or node.index in ends))
    ]
    last = weights[-1] if weights else inside[-1]
    return Roles("mixer", last.module, roles={"down": _whole([last])}) if meets else None


def _slides(graph: Graph, node: Node) -> bool:
    """Whether a node is a convolution over more than one position."""
    return node.op in CONVOLUTIONS and any(size > 1 for shape in _matrices(graph, node) for size in shape[2:])


def _matrices(graph: Graph, weight: Node) -> list[tuple[int, ...]]:
    """The shapes of the parameters that a product reads."""
    return [graph.nodes[i].shape for i in weight.inputs if graph.nodes[i].parameters and not graph.nodes[i].is_weight]


def _mlp(graph: Graph, branch: Branch, inside: list[Node]) -> Roles:
    routers = {w.index for n in inside if n.op in _CHOICES for w in graph.weights_behind(n.index)}
    every = [node for node in inside if node.is_weight]
    weights = [w for w in every if w.index not in routers and _width(w) > 1] or every
    last = [w for w in weights if not any(graph.reaches(w.index, other.index) for other in weights)]
    gates: list[Part] = []
    ups: list[Part] = []
    for node in inside:
        goes_on = node.op in MULTIPLICATIONS and any(graph.reaches(node.index, w.index) for w in last)
        pair = _gate(graph, branch.stream, node, routers) if goes_on else None
        if pair:
            gates += pair[0]
            ups += pair[1]
    named = {"gate": gates} if gates else {}
    if not gates:
        first = [w for w in weights if not any(graph.reaches(o.index, w.index) for o in weights)]
        ups = _whole([w for w in first if w not in last])
    named |= {"up": ups, "down": _whole(last)}
    return Roles("mlp", last[-1].module, roles={role: list(dict.fromkeys(parts)) for role, parts in named.items()})


def _width(weight: Node) -> int:
    """How many numbers a product makes of a position; experts may multiply a single column."""
    column = weight.op == "bmm" and weight.shape[-1] == 1
    return weight.shape[-2] if column else weight.shape[-1]


def _gate(graph: Graph, stream: int, product: Node, routers: set[int]) -> tuple[list[Part], list[Part]] | None:
    """(gate, up) where a multiplication joins two different projections."""
    sides = [i for i in product.inputs if graph.reaches(stream, i)]
    if len(sides) != 2:
        return None
    behind = [
        [w for w in graph.weights_behind(side) if graph.reaches(stream, w.index) and w.index not in routers]
        for side in sides
    ]
    if not all(len(weights) == 1 for weights in behind):
        return None
    parts = [_parts(graph, side) for side in sides]
    if parts[0] == parts[1] or (behind[0] == behind[1] and any(part[0].spans is None for part in parts)):
        return None
    bends = [sum(n.op not in VIEWS for n in graph.between(w[0].index, side)) if w[0].index != side else 0
             for w, side in zip(behind, sides, strict=True)]  # fmt: skip
    return (parts[0], parts[1]) if bends[0] > bends[1] else (parts[1], parts[0])
