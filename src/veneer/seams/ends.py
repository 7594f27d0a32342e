"""Where a sublayer's two ends can be reached: the modules that its input, its output and the stream beside it pass by.

- Its output is what the outermost module inside the adding module returns, before the add; dropout in between is passed
  over, because one dropout may serve several sublayers.
- Its input is what its first weights read: behind the norm in a pre-norm block, the stream itself in a post-norm one.
- The stream is the other operand of the add.
- In a post-norm block a norm is all that reads the sum; elsewhere the sum goes on as it is.

Hooks must lie inside the block, because gradient checkpointing recomputes what lies inside and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from veneer.seams.trace import Graph

_NORMS = {"layer_norm", "rms_norm", "rsqrt"}
# What returns its input's own numbers, while evaluating.
_SAME = {"dropout", "to", "contiguous", "view", "reshape", "clone", "type_as", "float"}

Key = int | str
K = TypeVar("K")


@dataclass(frozen=True)
class Ends:
    """`output` is (module, item of what it returns or None); `sources` has "input" and "residual" as (module, key).

    `norm` is the module that normalises the sum, empty where the block goes on with the sum itself. `blocks` are
    the repeated modules that it lies in, the outermost first.
    """

    width: int = 0
    blocks: tuple[str, ...] = ()
    output: tuple[str, Key | None] | None = None
    sources: dict[str, tuple[str, Key]] = field(default_factory=dict)
    norm: str = ""


def find(graph: Graph, add: int, stream: int, branch: int, repeated: list[str]) -> Ends:
    """The ends of the sublayer between `stream` and `branch`, whose sum is the node `add`."""
    adding = graph.nodes[add].module
    returned = _outermost(
        (call.path, key)
        for same in _same(graph, branch)
        for call in graph.calls
        for key, node in call.outputs.items()
        if node == same and _inside(call.path, adding) and graph.kinds[call.path] != "Dropout"
    )
    around = sorted((path for path in repeated if returned and _inside(f"{returned[0]}.", path)), key=len)
    block = around[-1] if around else adding
    first = next((n for n in graph.between(stream, branch) if n.is_weight or n.core), None)
    inputs = [i for i in first.inputs if i == stream or graph.reaches(stream, i)] if first else []
    ends = {"input": inputs[0] if inputs else stream, "residual": stream}
    found = {
        name: _outermost(
            (call.path, key)
            for same in _same(graph, node)
            for call in graph.calls
            for key, read in call.inputs.items()
            if read == same and _inside(call.path, block)
        )
        for name, node in ends.items()
    }
    sources = {name: end for name, end in found.items() if end is not None}
    return Ends(graph.nodes[branch].shape[-1], tuple(around), returned, sources, _norm(graph, add, block))


def _norm(graph: Graph, add: int, block: str) -> str:
    """The one module of the block that reads the sum, where it is a norm; or the empty string."""
    readers = {node.module for node in graph.nodes[add + 1 :] if add in node.inputs}
    path = readers.pop() if len(readers) == 1 else ""
    given = any(call.path == path and add in call.inputs.values() for call in graph.calls)
    normal = any(node.module == path and node.op in _NORMS for node in graph.nodes[add + 1 :])
    return path if given and normal and _inside(path, block) else ""


def _same(graph: Graph, index: int) -> list[int]:
    """A node and those before it that hold the same numbers."""
    found = [index]
    while graph.nodes[found[-1]].op in _SAME and graph.nodes[found[-1]].inputs:
        found.append(graph.nodes[found[-1]].inputs[0])
    return found


def _inside(path: str, module: str) -> bool:
    return path != module and path.startswith(f"{module}." if module else "")


def _outermost(found: Iterable[tuple[str, K]]) -> tuple[str, K] | None:
    return min(found, key=lambda end: end[0].count("."), default=None)
