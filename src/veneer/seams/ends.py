"""Where a sublayer's two ends can be reached: the modules that its input, its output and the stream beside it pass by.

- Its output is what the outermost module inside the adding module returns, before the add; dropout in between is passed
  over, because one dropout may serve several sublayers, and so is a sequence, which would run what stands in it.
- Its input is what its first weights read: behind the norm in a pre-norm block, the stream itself in a post-norm one.
- The stream is the other operand of the add.
- In a post-norm block a norm is all that reads the sum; elsewhere the sum goes on as it is.

Hooks must lie inside the block, because gradient checkpointing recomputes what lies inside and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from veneer.seams.graph import Graph, Key
from veneer.seams.residuals import SAME, Branch, around, chain

K = TypeVar("K")
_NORMS = {"layer_norm", "rms_norm", "rsqrt"}
_PASSED_OVER = {"Dropout", "Sequential"}


@dataclass(frozen=True)
class Ends:
    """`output` is (module, item of what it returns or None); `sources` has "input" and "residual" as (module, key).

    `blocks` are the repeated modules that it lies in, the outermost first.
    """

    width: int = 0
    blocks: tuple[str, ...] = ()
    output: tuple[str, Key | None] | None = None
    sources: dict[str, tuple[str, Key]] = field(default_factory=dict)
    norm: str = ""


def find(graph: Graph, branch: Branch, repeated: list[str]) -> Ends:
    """The ends of a branch."""
    alike = same(graph, branch.end)
    back = [alike, *([node] for node in chain(graph, branch.stream, branch.end) if node not in alike)]
    returned, width = None, graph.nodes[branch.end].shape[-1]
    for scope in (branch.adding, *around(branch.adding, repeated)[-1:]):
        for nodes in back if returned is None else ():
            returned = _outermost(
                (path, key)
                for node in nodes
                for path, key in graph.returned.get(node, [])
                if _inside(path, scope) and graph.kinds[path] not in _PASSED_OVER
            )
            if returned:
                width = graph.nodes[nodes[0]].shape[-1]
                break
    blocks = around(returned[0] if returned else branch.adding, repeated)
    block = blocks[-1] if blocks else branch.adding
    first = next((n for n in graph.between(branch.stream, branch.end) if n.is_weight or n.core), None)
    inputs = [i for i in first.inputs if i == branch.stream or graph.reaches(branch.stream, i)] if first else []
    found = {
        name: _outermost(
            (path, key)
            for alike in same(graph, node)
            for path, key in graph.given.get(alike, [])
            if _inside(path, block) or (returned and path == block == returned[0])
        )
        for name, node in {"input": inputs[0] if inputs else branch.stream, "residual": branch.stream}.items()
    }
    sources = {name: end for name, end in found.items() if end is not None}
    return Ends(width, blocks, returned, sources, _norm(graph, branch.add, block))


def of_module(graph: Graph, path: str, repeated: list[str]) -> Ends:
    """The ends of a module as a whole: what it is given first, and what it returns first."""
    call = next(call for call in graph.calls if call.path == path)
    output = next(iter(call.outputs.items()), None)
    given = next(iter(call.inputs), None)
    if output is None or given is None:
        return Ends(blocks=around(path, repeated))
    sources = {"input": (path, given), "residual": (path, given)}
    return Ends(graph.nodes[output[1]].shape[-1], around(path, repeated), (path, output[0]), sources)


def _norm(graph: Graph, add: int, block: str) -> str:
    """The one module of the block that reads the sum, where it is a norm; or the empty string."""
    readers = [node for node in graph.nodes[add + 1 :] if add in node.inputs]
    if len(readers) == 1 and readers[0].op in SAME and readers[0].module == graph.nodes[add].module:
        return _norm(graph, readers[0].index, block)
    paths = {node.module for node in readers}
    path = paths.pop() if len(paths) == 1 else ""
    given = any(at == path for at, _ in graph.given.get(add, []))
    normal = any(node.module == path and node.op in _NORMS for node in graph.nodes[add + 1 :])
    return path if given and normal and _inside(path, block) else ""


def same(graph: Graph, index: int) -> list[int]:
    """A node and those before it that hold the same numbers."""
    found = [index]
    while graph.nodes[found[-1]].op in SAME and graph.nodes[found[-1]].inputs:
        found.append(graph.nodes[found[-1]].inputs[0])
    return found


def _inside(path: str, module: str) -> bool:
    return path != module and path.startswith(f"{module}." if module else "")


def _outermost(found: Iterable[tuple[str, K]]) -> tuple[str, K] | None:
    return min(found, key=lambda end: end[0].count("."), default=None)
