"""One probe forward, recorded as a data-flow graph.

A `TorchFunctionMode` sees every torch call, hooks on the modules tell which of them makes it, and transformers'
attention interface is wrapped for the time of the trace so that an attention is one node. Parameters are best replaced
by meta tensors: shapes flow, no weight is needed, nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten
from torch.utils.hooks import RemovableHandle

from veneer.seams.graph import Call, Graph, Node

CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"}
PRODUCTS = CONVOLUTIONS | {
    *("linear", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "addmm", "baddbmm", "addbmm", "einsum", "bilinear"),
    *("tensordot", "grouped_mm", "_grouped_mm", "multi_head_attention_forward"),
}
# These take a shape from a tensor, and no numbers.
SHAPES = {
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "empty_like", "zeros_like", "ones_like"),
    *("full_like", "rand_like", "randn_like"),
}
LOOKUPS = {"__getitem__", "index_select"}
# A question about values has no answer on meta tensors; "no" keeps models on their general path, off their shortcuts.
NO_ANSWER = {"__bool__": False, "__contains__": False, "item": 0}
# On meta tensors torch's own takes bfloat16 alone.
GROUPED = {"grouped_mm", "_grouped_mm"}
FUSED_ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}


class Tracer(TorchFunctionMode):
    """Records a `Graph` while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = Graph(kinds={path: type(module).__name__ for path, module in model.named_modules()})
        self.paused = False
        self.stack = [""]
        self.last = ""
        self.modules = list(model.modules())
        self.hooks: list[RemovableHandle] = []
        self.paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
        self.parameters: dict[int, str] = {}
        self.node_of: dict[int, int] = {}
        self.alive: list[Tensor] = []

    def start(self, parameters: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        """Say which tensors are parameters, and which are the model's inputs."""
        self.parameters = {id(tensor): path for path, tensor in reversed(list(parameters.items()))}
        self.alive += parameters.values()
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
        self.last = self.paths[id(module)]
        self.stack.append(self.last)

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.paused:
            return
        self.paused = True
        several = dict(enumerate(output)) if isinstance(output, (tuple, list)) else output
        outputs = {None: output} if isinstance(output, Tensor) else several if isinstance(several, dict) else {}
        self._opaque(module, (args, kwargs), outputs.values())
        self.graph.calls.append(
            Call(self.stack[-1], self._nodes({**dict(enumerate(args)), **kwargs}), self._nodes(outputs))
        )
        self.paused = False

    def _opaque(self, module: nn.Module, given: Any, outputs: Iterable[Any]) -> None:
        """What a module returned that no torch call was seen to make came out of its own kernel."""
        unseen = [value for value in outputs if isinstance(value, Tensor) and id(value) not in self.node_of]
        inputs = tuple(self.node(tensor).index for tensor in _tensors(given)) if unseen else ()
        matrices = [p for p in module._parameters.values() if p is not None and p.dim() >= 2] if unseen else []
        paths = tuple(self.parameters[id(p)] for p in matrices if id(p) in self.parameters)
        for tensor in unseen:
            self.add(
                tensor,
                Node(0, "opaque", self.stack[-1], (), inputs, parameters=paths, is_weight=bool(paths and inputs)),
            )

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
        node.index, node.shape, node.dtype = len(nodes), tuple(tensor.shape), tensor.dtype
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
            if func.__name__ in GROUPED and args[0].is_meta:
                output = args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])
            else:
                output = func(*args, **kwargs)
        finally:
            self.paused = False
        self.record(func, args, kwargs, output)
        return output

    def record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Add a node for each tensor that a call returned, or wrote to."""
        name = func.__name__
        inputs = [self.node(tensor) for tensor in _tensors((args, kwargs))] if name not in SHAPES else []
        outputs = list(_tensors(output))
        if name == "__setitem__":
            outputs = [args[0]]
        data = [node for node in inputs if not node.parameters or node.is_weight]
        weights = [node for node in inputs if node.parameters and not node.is_weight and len(node.shape) >= 2]
        parameters = tuple(path for node in weights for path in node.parameters)
        is_weight = bool(data and weights) and name in PRODUCTS
        chosen = name in LOOKUPS and bool(weights) and inputs[0] is weights[0] and len(weights[0].shape) >= 3
        core = None
        if name in FUSED_ATTENTION:
            operands = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
            core = (self.node(operands[0]).index, self.node(operands[1]).index, self.node(operands[2]).index)
        read = tuple(dict.fromkeys(node.index for node in inputs))
        for position, tensor in enumerate(outputs):
            call = self._replayable(func, args, kwargs, position if isinstance(output, (tuple, list)) else None)
            node = Node(0, name, self.stack[-1], (), read, is_weight=is_weight, core=core, call=call)
            node.parameters = parameters if is_weight or chosen or not data else ()
            self.add(tensor, node)
            base = tensor._base
            if base is not None and id(base) in self.node_of and _writes(name):
                self._written(base, tensor)

    def _written(self, base: Tensor, view: Tensor) -> None:
        """A new node for a tensor of which a view was written to."""
        before, part = self.node_of[id(base)], self.node_of[id(view)]
        whole, size, stride, offset = base.numel(), view.shape, view.stride(), view.storage_offset()

        def call(values: dict[int, Tensor]) -> Tensor:
            where = torch.arange(whole).as_strided(size, stride, offset).flatten()
            return values[before].flatten().index_copy(0, where, values[part].flatten()).view(values[before].shape)

        node = Node(0, "write", self.stack[-1], (), (before, part))
        node.call = call if base.is_contiguous() else None
        self.add(base, node)

    def _replayable(
        self, func: Callable[..., Any], args: Any, kwargs: Any, position: int | None
    ) -> Callable[[dict[int, Tensor]], Tensor]:
        """The call again, on other values for its tensors."""
        leaves, structure = tree_flatten((args, kwargs))
        indices = [self.node(leaf).index if isinstance(leaf, Tensor) else None for leaf in leaves]

        def call(values: dict[int, Tensor]) -> Tensor:
            filled = [leaf if i is None else values[i].clone() for leaf, i in zip(leaves, indices, strict=True)]
            again_args, again_kwargs = tree_unflatten(filled, structure)
            output = func(*again_args, **again_kwargs)
            if func.__name__ == "__setitem__":
                output = again_args[0]
            result: Tensor = output if position is None else list(_tensors(output))[position]
            return result

        return call

    def attention(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, run: Callable[[], Any]) -> Any:
        """One attention through an interface: run it unseen, and record it as a single node."""
        operands = (self.node(q).index, self.node(k).index, self.node(v).index)
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


def _writes(name: str) -> bool:
    """Whether a call changes the tensor it is given, which may be a view of another."""
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.startswith("_"))
