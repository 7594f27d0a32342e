"""One probe forward, recorded as a data-flow graph.

A `TorchFunctionMode` sees every torch call, hooks on the modules tell which of them makes it, and transformers'
attention interface is wrapped for the time of the trace so that an attention is one node. Parameters are replaced by
meta tensors: shapes flow, no weight is needed, nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten
from torch.utils.hooks import RemovableHandle

PRODUCTS = {"linear", "matmul", "__matmul__", "bmm", "mm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d",
            "multi_head_attention_forward"}  # fmt: skip
# A question about values has no answer on meta tensors; "no" keeps models on their general path, off their shortcuts.
NO_ANSWER = {"__bool__": False, "__contains__": False, "item": 0}
FUSED_ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}


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
    core: tuple[int, ...] | None = None
    call: Callable[[dict[int, Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class Call:
    """One call of a module: the nodes it was given, by position or name, and those it returned (None: all there is)."""

    path: str
    inputs: dict[int | str, int]
    outputs: dict[int | str | None, int]


@dataclass
class Graph:
    """All nodes in the order of the forward; sets of nodes are integers, bit i for node i."""

    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    """The class name of each module."""

    def reaches(self, start: int, end: int) -> bool:
        """Whether data flows from one node to another."""
        return bool(self.nodes[end].ancestors >> start & 1)

    def between(self, start: int, end: int) -> list[Node]:
        """Nodes that data passes from `start` to `end`; with `end`, without `start`."""
        ancestors = self.nodes[end].ancestors
        return [n for n in self.nodes[start + 1 : end] if ancestors >> n.index & 1 and n.ancestors >> start & 1] + [
            self.nodes[end]
        ]

    def weights_behind(self, index: int) -> list[Node]:
        """The nearest products with a parameter that a node descends from."""
        found, seen, stack = [], set[int](), [index]
        while stack:
            node = self.nodes[stack.pop()]
            if node.index in seen or node.core:
                continue
            seen.add(node.index)
            if node.is_weight:
                found.append(node)
            else:
                stack.extend(node.inputs)
        return sorted(found, key=lambda node: node.index)

    def replay(self, start: int, end: int, seed: int = 0) -> Tensor:
        """Which columns (last dimension) of node `start` reach node `end`: a mask, by gradients of random numbers."""
        random = torch.Generator().manual_seed(seed)
        values = {start: torch.randn(self.nodes[start].shape, generator=random, requires_grad=True)}
        for node in self.between(start, end):
            assert node.call is not None
            for i in node.inputs:
                if i not in values:
                    values[i] = torch.rand(self.nodes[i].shape, generator=random) + 0.5
            with torch.enable_grad():
                values[node.index] = node.call(values)
        end_value = values[end]
        weights = torch.rand(end_value.shape, generator=random) + 0.5
        (gradient,) = torch.autograd.grad((end_value * weights).sum(), values[start])
        return gradient.flatten(0, -2).ne(0).any(0)


class Tracer(TorchFunctionMode):
    """Records a `Graph` while it is entered."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.graph = Graph(kinds={path: type(module).__name__ for path, module in model.named_modules()})
        self.paused = False
        self.stack = [""]
        self.modules = list(model.modules())
        self.hooks: list[RemovableHandle] = []
        self.paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
        self.parameters = {id(tensor): path for path, tensor in reversed(list(parameters.items()))}
        self.node_of: dict[int, int] = {}
        self.alive: list[Tensor] = list(parameters.values())
        for name, tensor in inputs.items():
            self.add(tensor, Node(0, f"input {name}", "", ()))

    def __enter__(self) -> Tracer:
        for module in self.modules:
            self.hooks += [
                module.register_forward_pre_hook(self._entered, prepend=True),
                module.register_forward_hook(self._called, with_kwargs=True),
                module.register_forward_hook(self._left, always_call=True),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self.hooks:
            hook.remove()

    def _entered(self, module: nn.Module, args: Any) -> None:
        self.stack.append(self.paths[id(module)])

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.paused:
            return
        self.paused = True
        several = dict(enumerate(output)) if isinstance(output, (tuple, list)) else output
        outputs = {None: output} if isinstance(output, Tensor) else several if isinstance(several, dict) else {}
        self.graph.calls.append(
            Call(self.stack[-1], self._nodes({**dict(enumerate(args)), **kwargs}), self._nodes(outputs))
        )
        self.paused = False

    def _nodes(self, values: dict[Any, Any]) -> dict[Any, int]:
        return {key: self.node(value).index for key, value in values.items() if isinstance(value, Tensor)}

    def node(self, tensor: Tensor) -> Node:
        """The node of a tensor; one seen for the first time is an input or a parameter."""
        index = self.node_of.get(id(tensor))
        if index is not None:
            return self.graph.nodes[index]
        path = self.parameters.get(id(tensor))
        return self.add(tensor, Node(0, "parameter" if path else "input", "", (), parameters=(path,) if path else ()))

    def add(self, tensor: Tensor, node: Node) -> Node:
        """Append a node and let it stand for the tensor."""
        nodes = self.graph.nodes
        node.index, node.shape = len(nodes), tuple(tensor.shape)
        for i in node.inputs:
            node.ancestors |= nodes[i].ancestors | 1 << i
        nodes.append(node)
        self.node_of[id(tensor)] = node.index
        self.alive.append(tensor)
        return node

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func.__name__ in NO_ANSWER and args[0].is_meta:
            return NO_ANSWER[func.__name__]
        self.paused = True
        try:
            output = func(*args, **kwargs)
        finally:
            self.paused = False
        self.record(func, args, kwargs, output)
        return output

    def record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Add a node for each tensor that a call returned, or wrote to."""
        name = func.__name__
        inputs = [self.node(tensor) for tensor in _tensors((args, kwargs))]
        outputs = list(_tensors(output))
        if name == "__setitem__":
            outputs = [args[0]]
        if name == "copy_" and self._copied_into_a_part(args[0], inputs[0], inputs[1]):
            return
        data = [node for node in inputs if not node.parameters or node.is_weight]
        matrices = [node for node in inputs if node.parameters and not node.is_weight and len(node.shape) >= 2]
        parameters = tuple(path for node in matrices for path in node.parameters)
        is_weight = bool(data and matrices) and name in PRODUCTS
        core = None
        if name in FUSED_ATTENTION:
            core = (inputs[0].index, inputs[1].index, inputs[2].index)
        for position, tensor in enumerate(outputs):
            call = self._replayable(func, args, kwargs, position if isinstance(output, (tuple, list)) else None)
            self.add(
                tensor,
                Node(0, name, self.stack[-1], (), tuple(dict.fromkeys(node.index for node in inputs)), call=call,
                     parameters=parameters if is_weight or not data else (), is_weight=is_weight, core=core),
            )  # fmt: skip

    def _copied_into_a_part(self, part: Tensor, view: Node, source: Node) -> bool:
        """Record a copy into a slice of a tensor as a new value of the whole tensor; False where it is no slice."""
        whole = part._base
        if whole is None or view.inputs != (self.node(whole).index,) or view.call is None:
            return False
        before, take = self.node(whole).index, view.call

        def call(values: dict[int, Tensor]) -> Tensor:
            new = values[before].clone()
            take({before: new}).copy_(values[source.index])
            return new

        self.add(whole, Node(0, "copy_", self.stack[-1], (), (before, source.index), call=call))
        return True

    def _replayable(
        self, func: Callable[..., Any], args: Any, kwargs: Any, position: int | None
    ) -> Callable[[dict[int, Tensor]], Tensor]:
        """The call again, on other values for its tensors."""
        leaves, structure = tree_flatten((args, kwargs))
        indices = [self.node_of[id(leaf)] if isinstance(leaf, Tensor) else None for leaf in leaves]

        def call(values: dict[int, Tensor]) -> Tensor:
            filled = [leaf if i is None else values[i] for leaf, i in zip(leaves, indices, strict=True)]
            again_args, again_kwargs = tree_unflatten(filled, structure)
            output = func(*again_args, **again_kwargs)
            result: Tensor = output if position is None else list(_tensors(output))[position]
            return result

        return call

    def attention(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, run: Callable[[], Any]) -> Any:
        """One attention through an interface: run it unseen, and record it as a single node."""
        operands = tuple(self.node(tensor).index for tensor in (q, k, v))
        path = self.paths.get(id(module), "")
        self.paused = True  # reading a shape is a torch call too
        try:
            output = run()
            node = Node(0, "attention", path, (), tuple(dict.fromkeys(operands)), core=operands)
            self.add(next(_tensors(output)), node)
        finally:
            self.paused = False
        return output


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
