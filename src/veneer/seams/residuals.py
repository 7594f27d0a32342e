"""The residual adds of a forward: where the stream takes up what a branch beside it computed.

- A residual add is an add of two equal shapes, one operand an ancestor of the other with a weight or an attention
  between. The stream may be scaled on the way.
- In a parallel block, x + attention(x) + mlp(x), the adds may be taken in any order; each branch counts from x.
- An add across whole blocks, as between the halves of a U, is none; within one block the outer add counts, and what a
  branch adds up inside is its own affair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from veneer.seams.graph import Graph

ADDS = {"add", "__add__", "__radd__", "__iadd__", "add_"}
MULTIPLICATIONS = {"mul", "__mul__", "__rmul__", "__imul__", "mul_"}
# What returns its input's own numbers while evaluating, or a multiple of them.
SAME = {"dropout", "to", "contiguous", "view", "reshape", "clone", "type_as", "float", "detach"}
_MULTIPLES = SAME | MULTIPLICATIONS | {"div", "__truediv__", "type"}


@dataclass(frozen=True)
class Branch:
    """What lies between `stream` and `end`, which the module `adding` adds up; `spine` is the stream and its past."""

    adding: str
    stream: int
    end: int
    spine: tuple[int, ...] = ()
    add: int = -1
    """The node of the sum; -1 where there is none."""


def find(graph: Graph, blocks: list[str]) -> list[Branch]:
    """Every branch beside a residual stream, in the order of their adds; `blocks` are the repeated modules."""
    found: list[tuple[int, Branch]] = []
    base: dict[int, int] = {}
    for node in graph.nodes:
        operands = [i for i in graph.data(node) if graph.nodes[i].shape == node.shape]
        if node.op not in ADDS or len(operands) != 2 or len(node.shape) < 2:
            continue
        for operand, end in (operands, operands[::-1]):
            stream = next((s for s in _streams(graph, operand, base) if graph.reaches(s, end)), None)
            if stream is not None and _works(graph, stream, end):
                base[node.index] = stream
                spine = tuple(_streams(graph, stream, base))
                found += [
                    (node.index, Branch(node.module, stream, part, spine, node.index))
                    for part in _split(graph, stream, end, node.module)
                ]
                break
    return _apart(graph, found, blocks)


def _apart(graph: Graph, found: list[tuple[int, Branch]], blocks: list[str]) -> list[Branch]:
    """Of branches that lie in one another, those that are sublayers."""
    block_of = {index: (around(branch.adding, blocks) or ("",))[-1] for index, branch in found}
    inner: set[int] = set()
    outer: set[int] = set()
    for index, branch in found:
        inside = {n.index for n in graph.between(branch.stream, branch.end)} & set(block_of)
        if block_of[index] and all(block_of[other] == block_of[index] for other in inside):
            inner |= inside
        elif inside:
            outer.add(index)
    return [branch for index, branch in found if index not in inner and index not in outer]


def around(path: str, blocks: list[str]) -> tuple[str, ...]:
    """The repeated modules that a module lies in, or is, the outermost first."""
    return tuple(sorted((block for block in blocks if f"{path}.".startswith(f"{block}.")), key=len))


def _streams(graph: Graph, index: int | None, base: dict[int, int]) -> Iterator[int]:
    """What an operand may stand for: itself, what it is a multiple of, and the streams it was added to."""
    while index is not None:
        yield index
        node = graph.nodes[index]
        whole = [i for i in graph.data(node) if graph.nodes[i].shape == node.shape]
        multiple = whole[0] if node.op in _MULTIPLES and len(whole) == 1 else None
        index = base.get(index, multiple)


def _works(graph: Graph, stream: int, end: int) -> bool:
    return any(node.is_weight or node.core for node in graph.between(stream, end))


def _split(graph: Graph, stream: int, end: int, adding: str) -> list[int]:
    """The branches of a parallel block where their sum is taken first, by the module that adds them to the stream."""
    for same in chain(graph, stream, end):
        node = graph.nodes[same]
        ends = [i for i in graph.data(node) if graph.reaches(stream, i)]
        if node.op in ADDS and node.module == adding and len(ends) == 2:
            apart = not graph.reaches(*ends) and not graph.reaches(*ends[::-1])
            if apart and all(_works(graph, stream, part) for part in ends):
                return [part for branch in ends for part in _split(graph, stream, branch, adding)]
    return [end]


def chain(graph: Graph, stream: int, end: int) -> list[int]:
    """A node and those before it, as long as one alone descends from the stream; the last may be a weight."""
    found = [end]
    while True:
        node = graph.nodes[found[-1]]
        before = [i for i in graph.data(node) if graph.reaches(stream, i)]
        if node.is_weight or node.core or node.op == "opaque" or len(before) != 1:
            return found
        found.append(before[0])
