"""The data-flow graph of one forward: which call made each tensor, what that call read, and which modules it passed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

Key = int | str


@dataclass
class Node:
    """One tensor of the forward: the call that made it, and what that call read."""

    index: int
    op: str
    module: str
    shape: tuple[int, ...]
    inputs: tuple[int, ...] = ()
    ancestors: int = 0
    parameters: tuple[str, ...] = ()
    is_weight: bool = False
    core: tuple[int, int, int] | None = None
    """Of an attention: the nodes of its queries, keys and values."""
    dtype: torch.dtype = torch.float32
    call: Callable[[dict[int, Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class Call:
    """One call of a module: the nodes it was given, by position or name, and those it returned (None: all there is)."""

    path: str
    inputs: dict[Key, int]
    outputs: dict[Key | None, int]


@dataclass
class Graph:
    """All nodes in the order of the forward; sets of nodes are integers, bit i for node i."""

    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    """The class name of each module."""

    @cached_property
    def given(self) -> dict[int, list[tuple[str, Key]]]:
        """By node, the modules it was handed to: path and argument."""
        found: dict[int, list[tuple[str, Key]]] = {}
        for call in self.calls:
            for key, node in call.inputs.items():
                found.setdefault(node, []).append((call.path, key))
        return found

    @cached_property
    def returned(self) -> dict[int, list[tuple[str, Key | None]]]:
        """By node, the modules that returned it: path and item."""
        found: dict[int, list[tuple[str, Key | None]]] = {}
        for call in self.calls:
            for key, node in call.outputs.items():
                found.setdefault(node, []).append((call.path, key))
        return found

    def reaches(self, start: int, end: int) -> bool:
        """Whether data flows from one node to another."""
        return bool(self.nodes[end].ancestors >> start & 1)

    def between(self, start: int, end: int) -> list[Node]:
        """Nodes that data passes from `start` to `end`; with `end`, without `start`."""
        ancestors = self.nodes[end].ancestors
        return [n for n in self.nodes[start + 1 : end] if ancestors >> n.index & 1 and n.ancestors >> start & 1] + [
            self.nodes[end]
        ]

    def data(self, node: Node) -> list[int]:
        """What a call read that is neither a parameter nor a lone number."""
        return [i for i in node.inputs if self.nodes[i].shape and self.nodes[i].op != "parameter"]

    def weights_behind(self, index: int) -> list[Node]:
        """The nearest products with a parameter that a node descends from."""
        found, seen, stack = [], set[int](), [index]
        while stack:
            node = self.nodes[stack.pop()]
            if node.index in seen or (node.core and not node.is_weight):
                continue
            seen.add(node.index)
            if node.is_weight:
                found.append(node)
            else:
                stack.extend(node.inputs)
        return sorted(found, key=lambda node: node.index)

    def replay(self, start: int, end: int, seed: int = 0) -> Tensor:
        """Which columns (last dimension) of node `start` reach node `end` past no other weight: a mask.

        Gradients of random numbers tell.
        """
        random = torch.Generator().manual_seed(seed)
        values = {start: torch.randn(self.nodes[start].shape, generator=random, requires_grad=True)}
        for node in self.between(start, end):
            if node.is_weight:
                continue
            assert node.call is not None
            for i in node.inputs:
                if i not in values:
                    number = torch.rand(self.nodes[i].shape, generator=random) + 0.5
                    values[i] = number.to(self.nodes[i].dtype) if not self.nodes[i].dtype.is_floating_point else number
            with torch.enable_grad():
                values[node.index] = node.call(values)
        end_value = values[end]
        weights = torch.rand(end_value.shape, generator=random) + 0.5
        (gradient,) = torch.autograd.grad((end_value * weights).sum(), values[start])
        gradient = gradient.squeeze(-1)  # experts may multiply a single column
        return gradient.flatten(0, -2).ne(0).any(0)
