"""FlatAdamW: AdamW over parameters that lie side by side in memory, so that a step is one call and not one for each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from veneer.errors import OptimizerError

_PIECE = 1 << 16
"""Elements that a CPU updates at a time: all five tensors of a piece stay in its cache."""


class FlatAdamW(torch.optim.AdamW):
    """AdamW whose parameters, gradients and moments lie in one buffer each, for every group, dtype and device.

        m = β₁·m + (1 - β₁)·g,  v = β₂·v + (1 - β₂)·g²,  θ = (1 - lr·λ)·θ - lr·(m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

    An adapter has hundreds of small tensors, and a step over each costs more in calls than in arithmetic. Here the
    parameters become views of a buffer, and come out bit for bit as from `torch.optim.AdamW` with the same options,
    whose code runs on the buffer. Where some have no gradient, as when not all adapters act, those that have one are
    updated one by one, as AdamW does.

    `lr`, `betas`, `eps` and `weight_decay` are AdamW's, with its defaults, in groups too; `fused` takes torch's fused
    kernel, which rounds otherwise. `state_dict` has AdamW's form, and each of the two loads the other's. What else
    moves parameters (`model.to`, a checkpoint, a copy of the optimizer) is noticed at the next step, which gathers them
    anew.

    `parameters()`, `gradients()` and `clip_grad_norm_` give the buffers for what else is one call: an average of the
    weights, an all-reduce, clipping. `zero_grad(set_to_none=False)` zeroes them at once.

    Parameters that cannot lie in a buffer (FSDP2's DTensor, other subclasses, gaps in memory) are updated beside it by
    torch's foreach, and a warning says how many. On a CPU each parameter keeps a storage of its own size; elsewhere it
    is a view, so that a plain pickle holds the buffer once for each.

    Raises OptimizerError for `amsgrad`, `capturable` or `differentiable` in a group, and for sparse gradients.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        fused: bool = False,
    ) -> None:
        self._buffers: list[tuple[int, _Buffer]] | None = None
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused or None)
        loose = sum(not _fits(parameter) for parameter in self._all())
        if loose:
            warnings.warn(
                f"{loose} of {len(list(self._all()))} parameters cannot lie in a flat buffer (sharded, or not dense in "
                "memory); torch's foreach updates them.",
                stacklevel=2,
            )
        self._gather()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What was loaded or copied is gathered at the next step."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._buffers = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As AdamW's."""
        super().add_param_group(param_group)
        self._buffers = None

    def _all(self) -> Iterator[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _gather(self) -> list[tuple[int, _Buffer]]:
        """The buffers with the number of their group, made anew where something has moved."""
        if self._buffers is not None and all(buffer.holds(self.state) for _, buffer in self._buffers):
            return self._buffers
        self._buffers = []
        for number, group in enumerate(self.param_groups):
            for option in ("amsgrad", "capturable", "differentiable"):
                if group.get(option):
                    raise OptimizerError(f"FlatAdamW has no {option}. Use torch.optim.AdamW.")
            kinds: dict[Any, list[Tensor]] = {}
            for parameter in group["params"]:
                if _fits(parameter):
                    kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
            self._buffers += [(number, _Buffer(found, self.state)) for found in kinds.values()]
        return self._buffers

    def parameters(self) -> list[Tensor]:
        """The buffers that the parameters are views of."""
        return [buffer.weights for _, buffer in self._gather()]

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """The buffers of the gradients, of which every `.grad` is a view from now on; zero where there is none."""
        for _, buffer in self._gather():
            buffer.collect()
        return [buffer.gradients for _, buffer in self._gather()]

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm together is at most `max_norm`; the norm before."""
        loose = [p.grad for p in self._all() if not _fits(p) and p.grad is not None]
        gradients = [*self.gradients(), *loose]
        norm = torch.nn.utils.get_total_norm(gradients)
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.device))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As AdamW's; with `set_to_none=False` the gradients stay in their buffers, zeroed in one call each."""
        if set_to_none:
            super().zero_grad()
            return
        for _, buffer in self._gather():
            buffer.collect()
            buffer.gradients.zero_()
        for parameter in self._all():
            if not _fits(parameter) and parameter.grad is not None:
                parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None and p.grad.is_sparse for p in self._all()):
            raise OptimizerError("FlatAdamW takes no sparse gradients. Build the embedding with sparse=False.")
        for number, buffer in self._gather():
            buffer.step(self.state, self.param_groups[number])
        for group in self.param_groups:
            loose = [p for p in group["params"] if not _fits(p) and p.grad is not None]
            for parameter in loose:
                if not self.state[parameter]:
                    self.state[parameter].update(
                        step=_zero(),
                        exp_avg=torch.zeros_like(parameter, memory_format=torch.preserve_format),
                        exp_avg_sq=torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    )
            _update(loose, [p.grad for p in loose], [self.state[p] for p in loose], group, foreach=True)
        return loss


class _Buffer:
    """Parameters of one group, dtype and device, and their gradients and moments, in one tensor each."""

    def __init__(self, parameters: Sequence[Tensor], states: dict[Tensor, Any]) -> None:
        self.held = list(parameters)
        sizes = [parameter.numel() for parameter in parameters]
        like = parameters[0]
        make = lambda: torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)  # noqa: E731
        self.weights, self.gradients, self.means, self.squares = make(), make(), make(), make()  # type: ignore[no-untyped-call]
        self.views = {
            name: _views(vars(self)[name], parameters) for name in ("weights", "gradients", "means", "squares")
        }
        self.steps = torch.zeros(len(sizes), dtype=_zero().dtype)
        for number, parameter in enumerate(parameters):
            self.views["weights"][number].copy_(parameter.detach())
            parameter.data = self.views["weights"][number]
            if state := states.get(parameter):
                self.views["means"][number].copy_(state["exp_avg"])
                self.views["squares"][number].copy_(state["exp_avg_sq"])
                self.steps[number] = float(state["step"])
                states[parameter] = self._state(number)
        self.places = [view.data_ptr() for view in self.views["weights"]]

    def _state(self, number: int) -> dict[str, Tensor]:
        return {
            "step": self.steps[number],
            "exp_avg": self.views["means"][number],
            "exp_avg_sq": self.views["squares"][number],
        }

    def holds(self, states: dict[Tensor, Any]) -> bool:
        """Whether parameters and moments are still where they were put."""
        if [parameter.data_ptr() for parameter in self.held] != self.places:
            return False
        first = states.get(self.held[0])
        return not first or first["exp_avg"].data_ptr() == self.means.data_ptr()

    def collect(self) -> None:
        """Bring gradients that lie elsewhere into the buffer; where there is none, zeros."""
        into, found = [], []
        for parameter, view in zip(self.held, self.views["gradients"], strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad is not view:
                into.append(view)
                found.append(parameter.grad)
                parameter.grad = view
        if found:
            torch._foreach_copy_(into, found)

    def step(self, states: dict[Tensor, Any], group: dict[str, Any]) -> None:
        """AdamW on the whole buffer, or on the parameters that have a gradient."""
        trained = [number for number, parameter in enumerate(self.held) if parameter.grad is not None]
        for number in trained:
            if not states.get(self.held[number]):
                states[self.held[number]] = self._state(number)
        if len(trained) < len(self.held) or bool((self.steps != self.steps[0]).any()):
            some = [self.held[number] for number in trained]
            _update(some, [p.grad for p in some], [self._state(number) for number in trained], group)
            return
        self.collect()
        piece = _PIECE if self.weights.device.type == "cpu" and not group["fused"] else max(1, self.weights.numel())
        cut = [vars(self)[name].split(piece) for name in ("weights", "gradients", "means", "squares")]
        pieces = [
            {"step": self.steps[0].clone(), "exp_avg": m, "exp_avg_sq": v} for m, v in zip(cut[2], cut[3], strict=True)
        ]
        _update(cut[0], cut[1], pieces, group, foreach=False)
        self.steps += 1
        torch.autograd.graph.increment_version(self.held)  # they were changed through the buffer


def _update(
    weights: Sequence[Tensor],
    gradients: Sequence[Any],
    states: Sequence[dict[str, Tensor]],
    group: dict[str, Any],
    foreach: bool | None = None,
) -> None:
    if not weights:
        return
    beta1, beta2 = group["betas"]
    adamw(
        [weight.detach() for weight in weights],
        list(gradients),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        foreach=None if group["fused"] else foreach,
        fused=group["fused"] or None,
    )


def _views(buffer: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """A part of the buffer for each parameter, in its shape; on a CPU with a storage that ends where the part does."""
    parts = list(buffer.split([parameter.numel() for parameter in parameters]))
    if buffer.device.type == "cpu" and buffer.numel():
        memory, width, start = buffer.view(torch.uint8).numpy().data, buffer.element_size(), 0
        for number, part in enumerate(parts):
            count = part.numel()
            if count:
                parts[number] = torch.frombuffer(memory, dtype=buffer.dtype, count=count, offset=start * width)
            else:
                parts[number] = torch.empty_like(part)
            start += count
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


def _fits(parameter: Tensor) -> bool:
    plain = type(parameter) in (Tensor, torch.nn.Parameter) and parameter.layout == torch.strided
    return plain and parameter.is_contiguous() and not parameter.is_meta


def _zero() -> Tensor:
    return torch.tensor(0.0, dtype=torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32)
