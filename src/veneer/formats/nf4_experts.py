"""A mixture's experts in NF4: stacks of matrices, of which each one that tokens are sent to is made dense alone.

transformers computes experts in several ways, all of which read whole stacks and keep them for backward. Here there is
one: tokens are sorted by expert, each expert that has any multiplies its own, and a change that adds a low-rank product
to a stack adds it to the answers, so that nothing dense is kept between forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.errors import NotMergeable
from veneer.formats import Format, experts
from veneer.formats.nf4 import NF4Linear
from veneer.formats.nf4_storage import Holder, buffers, pack
from veneer.formats.quantized import become
from veneer.ops import grouped, nf4_kernels

STACKS = ("gate_up_proj", "up_proj", "down_proj")
"""What transformers' experts call them; the first two do not come together."""

_WAY = "_experts_implementation_internal"
"""Where a config says how experts are computed; its property would tell the configs inside it, too."""


@dataclass(frozen=True)
class Change:
    """What a delta makes of a stack [experts, out, in], of some outputs or all, for the time of one forward."""

    delta: Callable[[Tensor], Tensor]
    outputs: Tensor | None
    pair: tuple[Tensor, Tensor, float] | None
    """(A, B, s) where it adds s·B·A to whatever stack it is given."""

    def of(self, stack: Tensor) -> Tensor:
        """The changed stack."""
        if self.outputs is None:
            return self.delta(stack)
        return stack.index_copy(1, self.outputs, self.delta(stack.index_select(1, self.outputs)))

    def beside(self, x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
        """y = x·Wᵀ by expert, as it is with the pair in W."""
        assert self.pair is not None
        A, B, scale = self.pair
        h = grouped.multiply(x.to(y.dtype), A.to(y.dtype), ends) * scale
        added = grouped.multiply(h, B.to(y.dtype), ends)
        return y + added if self.outputs is None else y.index_add(1, self.outputs, added)


class NF4Experts(Holder):
    """The experts of a mixture with frozen stacks in NF4, dense only while they are multiplied by.

    `kind` is the class they had, with all of its attributes; stacks that are not in `names` stay as they are.
    """

    kind: type[nn.Module]
    num_experts: int

    def __init__(
        self, plain: nn.Module, names: Iterable[str], block_size: int, double_quant: bool, kernel: str | None = None
    ) -> None:
        super().__init__()
        _take(self, plain)
        self.kind, self.kernel, self.facts = type(plain), kernel, {}
        for name in names:
            self.pack(name, block_size, double_quant)

    def pack(self, name: str, block_size: int, double_quant: bool) -> None:
        """Store a dense stack in NF4."""
        stack = self._parameters[name]
        assert stack is not None
        self.hold(name, pack(stack, block_size, double_quant), stack.dtype)

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """The dense module that this one was, with what its bits stand for."""
        module = self.kind.__new__(self.kind)
        nn.Module.__init__(module)
        _take(module, self)
        for name in self.facts:
            module._parameters[name] = nn.Parameter(self.numbers(name).to(dtype), requires_grad=False)
        for name in ("kind", "kernel", "facts"):
            del vars(module)[name]
        for buffer in (buffer for name in self.facts for buffer in buffers(name).values()):
            del module._buffers[buffer]
            module._non_persistent_buffers_set.discard(buffer)
        return module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        own: Any = self
        tokens, chosen = top_k_index.shape
        numbers, order = top_k_index.flatten().sort()
        ends = torch.searchsorted(numbers, torch.arange(self.num_experts, device=numbers.device), right=True)
        ends = ends if ends.is_meta else ends.cpu()  # waited for once, and not in each product
        first = STACKS[0] if own.has_gate else STACKS[1]
        y = self._product(hidden_states[order // chosen], first, ends, numbers)
        y = self._apply_gate(y) if own.has_gate else own.act_fn(y)
        y = self._product(y, STACKS[2], ends, numbers)
        if own.has_post_expert_norm:
            y = own.post_expert_norm(y)
        y = y * top_k_weights.flatten()[order].unsqueeze(-1)
        whole: Tensor = y[order.argsort()].view(tokens, chosen, -1).sum(1)
        return whole.to(hidden_states.dtype)

    def _apply_gate(self, y: Tensor) -> Tensor:
        kind: Any = self.kind
        gated: Tensor = kind._apply_gate(self, y)
        return gated

    def _product(self, x: Tensor, name: str, ends: Tensor, numbers: Tensor) -> Tensor:
        own: Any = self
        if name in self.facts:
            y = self._changed(x, name, ends, vars(self).get(name, ()))
        else:
            stack = self._read(name)
            y = grouped.multiply(x, stack.mT if own.is_transposed else stack, ends)
        return y + self._read(f"{name}_bias")[numbers].to(y.dtype) if own.has_bias else y

    def _read(self, name: str) -> Tensor:
        """A dense parameter as this forward reads it."""
        tensor: Any = vars(self).get(name, self._parameters[name])
        return tensor  # type: ignore[no-any-return]

    def _changed(self, x: Tensor, name: str, ends: Tensor, changes: tuple[Change, ...]) -> Tensor:
        transposed = vars(self)["is_transposed"]
        if all(change.pair is not None for change in changes):
            y = nf4_kernels.multiply_grouped(x, self.held(name), ends, transposed, self.kernel)
            for change in changes:
                y = change.beside(x, y, ends)
            return y

        def inside(x: Tensor) -> Tensor:
            stack = self.numbers(name, x.dtype)
            stack = stack.mT if transposed else stack
            for change in changes:
                stack = change.of(stack)
            return grouped.multiply(x, stack, ends)

        if not torch.is_grad_enabled():
            return inside(x)
        made: Tensor = checkpoint(inside, x, use_reentrant=False, preserve_rng_state=False)  # keeps no stack
        return made

    def extra_repr(self) -> str:
        kernel = self.kernel or nf4_kernels.chosen(next(iter(self._parameters.values())).device.type)  # type: ignore[union-attr]
        stacks = [f"{name}={list(facts.shape)}, bits={self.held(name).bits:.3f}" for name, facts in self.facts.items()]
        return ", ".join([*stacks, f"kernel={kernel}"])


def _take(module: nn.Module, other: nn.Module) -> None:
    """Make what another module is made of a new module's own: attributes, tensors, children and mode."""
    own = vars(nn.Module()).keys()
    vars(module).update({name: value for name, value in vars(other).items() if name not in own})
    for part in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        vars(module)[part] = vars(other)[part].copy()
    module.training = other.training


class Experts(experts.Experts):
    """The format of `NF4Experts`."""

    quantized = True

    def now(self, owner: nn.Module) -> Format:
        return self if type(owner) is NF4Experts else experts.Experts()

    def weights(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        held = _experts(module).facts
        for name, parameter in module.named_parameters(recurse=False):
            if name in held or parameter.ndim == 3:
                yield "", name

    def shape(self, owner: nn.Module, parameter: str) -> tuple[int, ...]:
        facts = _experts(owner).facts.get(parameter)
        if facts is None:
            return super().shape(owner, parameter)
        return tuple(self.logical(owner, torch.empty(facts.shape, device="meta")).shape)

    def count(self, owner: nn.Module, parameter: str) -> int:
        facts = _experts(owner).facts.get(parameter)
        return super().count(owner, parameter) if facts is None else torch.Size(facts.shape).numel()

    def read(self, owner: nn.Module, parameter: str) -> Tensor:
        module = _experts(owner)
        if parameter not in module.facts:
            return super().read(owner, parameter)
        return self.logical(owner, module.numbers(parameter))

    def changed(self, owner: nn.Module, parameter: str, delta: Any, outputs: Tensor | None, pair: Any) -> Any:
        if parameter not in _experts(owner).facts:
            return super().changed(owner, parameter, delta, outputs, pair)
        return (*vars(owner).get(parameter, ()), Change(delta, outputs, pair))

    def stand_in(self, owner: nn.Module, weights: Mapping[str, Tensor]) -> Callable[..., Any]:
        return partial(_as_before, _experts(owner))

    def write(self, owner: nn.Module, parameter: str, weight: Tensor) -> None:
        raise NotMergeable("a NF4Experts stores its stacks quantized. Merge with veneer.merge.")

    def unpack(self, owner: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
        module = _experts(owner)
        if "forward" in vars(owner):
            raise NotMergeable(
                "the forward of these NF4Experts was replaced, as offloading does. Load the whole base on one device "
                "to merge into it."
            )
        facts, kernel = dict(module.facts), module.kernel
        become(owner, module.plain(dtype))

        def again() -> None:
            packed = NF4Experts(owner, (), 64, True, kernel)
            for name, one in facts.items():
                packed.pack(name, one.block_size, one.double_quant)
            become(owner, packed)

        return again


def _experts(owner: nn.Module) -> NF4Experts:
    assert isinstance(owner, NF4Experts)
    return owner


def _as_before(module: NF4Experts, *args: Any, **kwargs: Any) -> Any:
    """The forward of the class that it had, which reads what stands in the stacks' places; no numbers are asked for."""
    config = vars(module.config)
    before = config[_WAY]
    config[_WAY] = "grouped_mm"
    try:
        return module.kind.forward(module, *args, **kwargs)
    finally:
        config[_WAY] = before


def holder(module: nn.Module, names: Iterable[str], packing: Mapping[str, Any]) -> Holder:
    """What holds these weights of a dense module in NF4; `packing` is `block_size`, `double_quant` and `kernel`."""
    if isinstance(module, nn.Linear):
        return NF4Linear(module, **packing)
    return NF4Experts(module, names, **packing)
