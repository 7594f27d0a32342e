"""PagedAdamW: AdamW whose states lie off the device, and pass through a small window at each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from veneer.errors import OptimizerError
from veneer.optim.stores import FileStore, HostStore, Range

_ALIGN = 64
_SMALLEST = 4096
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Span:
    """Where the two moments of one parameter lie, one after the other, `size` bytes each with padding."""

    store: FileStore | HostStore
    offset: int
    size: int
    order: tuple[int, ...]

    def cut(self, part: slice, tensor: Tensor) -> Tensor:
        """A part of the elements, in the order in which the parameter has them in memory."""
        return tensor.permute(self.order).reshape(-1)[part]


@dataclass
class _Page:
    """What passes through the window at once: pieces of parameters, and where their moments lie."""

    ranges: list[Range] = field(default_factory=list)
    pieces: list[tuple[Tensor, int, int]] = field(default_factory=list)
    size: int = 0

    def add(self, parameter: Tensor, span: _Span, start: int, stop: int) -> None:
        for first in (span.offset + start, span.offset + span.size + start):
            if self.ranges and sum(self.ranges[-1]) == first:
                first, length = self.ranges.pop()
                self.ranges.append((first, length + stop - start))
            else:
                self.ranges.append((first, stop - start))
        self.pieces.append((parameter, start, stop))
        self.size += 2 * (stop - start)


class PagedAdamW(torch.optim.AdamW):
    """AdamW with its two moments in a file or in the host's memory, of which `window` bytes are at hand at a time.

        m = β₁·m + (1 - β₁)·g,  v = β₂·v + (1 - β₂)·g²,  θ = (1 - lr·λ)·θ - lr·(m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

    A step reads the moments of as many parameters as fit, or of a part of one that does not, updates them, and writes
    them back; every parameter comes out bit for bit as from `torch.optim.AdamW(params, lr, betas, eps, weight_decay)`,
    whose code it runs. Parameters may be of any size, dtype and device. Beside the window a step needs at most as much
    again for what it computes.

    `lr`, `betas`, `eps` and `weight_decay` are AdamW's, with its defaults, in groups too. `window` is in bytes (default
    64 MiB). `folder` holds the file; it has no name there, and its blocks are taken at once and given back when the
    optimizer goes or the process ends. Without a `folder`, moments of parameters on a CPU lie in a file in TMPDIR or
    /var/tmp, and those of others in pinned memory of the host, of which torch takes the next power of two. On a folder
    that lies in memory (tmpfs) nothing is gained.

    `state_dict` has AdamW's form, and each of the two loads the other's. Its moments are read from the file when they
    are looked at, so `torch.save` never has them all in memory; like AdamW's, they are not a copy, and later steps may
    change them.

    Raises OptimizerError for a window below 4,096 bytes, a disk without room, a parameter that is sparse, a tensor
    subclass (DTensor) or not dense in memory, a state with `amsgrad`, and for copying or pickling: the file is one.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        window: int = 64 * 2**20,
        folder: str | Path | None = None,
    ) -> None:
        if window < _SMALLEST:
            raise OptimizerError(f"PagedAdamW(window={window}): give at least {_SMALLEST} bytes.")
        self.window = window
        self.folder = folder
        self._stores: dict[torch.device, FileStore | HostStore] = {}
        self._spans: dict[Tensor, _Span] = {}
        self._planned = False
        super().__init__(params, lr, betas, eps, weight_decay)
        self._plan()
        self._planned = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As AdamW's, with room made for the new parameters at once."""
        super().add_param_group(param_group)
        if self._planned:
            try:
                self._plan()
            except OptimizerError:
                self.param_groups.pop()
                raise

    def _plan(self) -> None:
        """Give every parameter that has none a place for its moments."""
        sizes = {store: store.size for store in self._stores.values()}
        spans = {}
        for parameter in self._parameters():
            if parameter in self._spans:
                continue
            order = _order(parameter)
            store = self._stores.get(parameter.device)
            if store is None:
                store = self._stores[parameter.device] = self._store(parameter.device)
            size = -(-parameter.numel() * parameter.element_size() // _ALIGN) * _ALIGN
            offset = sizes.setdefault(store, 0)
            spans[parameter] = _Span(store, offset, size, order)
            sizes[store] += 2 * size
        for store, size in sizes.items():
            if size > store.size:
                store.grow(size)
        self._spans |= spans

    def _store(self, device: torch.device) -> FileStore | HostStore:
        if device.type == "cpu" or self.folder is not None:
            return FileStore(device, self.window, self.folder)
        return HostStore(device, self.window)

    def _parameters(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in trained:
                if parameter not in self._spans:
                    raise OptimizerError(
                        f"A parameter of shape {tuple(parameter.shape)} was put into PagedAdamW's groups behind its "
                        "back. Build the optimizer after whatever replaces parameters."
                    )
                if parameter.grad.is_sparse:
                    raise OptimizerError("PagedAdamW takes no sparse gradients. Build the embedding with sparse=False.")
            for page, window in self._pages(trained):
                self._update(group, page, window)
            for parameter in trained:
                state = self.state[parameter]
                state["step"] = state.get("step", _zero()) + 1
        return loss

    def _pages(self, parameters: Iterable[Tensor]) -> Iterator[tuple[_Page, Tensor]]:
        """Parameters as many at a time as the window holds, each page read before it is yielded and written after."""
        half = self.window // (2 * _ALIGN) * _ALIGN
        pages: dict[FileStore | HostStore, list[_Page]] = {}
        for parameter in parameters:
            span = self._spans[parameter]
            found = pages.setdefault(span.store, [_Page()])
            for start in range(0, span.size, half):
                stop = min(start + half, span.size)
                if found[-1].size + 2 * (stop - start) > self.window:
                    found.append(_Page())
                found[-1].add(parameter, span, start, stop)
        for store, found in pages.items():
            for page in found:
                yield page, store.read(page.ranges)
                store.write(page.ranges)

    def _pieces(self, page: _Page, window: Tensor) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor], list[Tensor]]]:
        """For each piece in a window: its parameter, what cuts it out of such a tensor, and its two moments."""
        at = 0
        for parameter, start, stop in page.pieces:
            span, width = self._spans[parameter], parameter.element_size()
            part = slice(start // width, min(stop // width, parameter.numel()))
            halves = window[at : at + 2 * (stop - start)].view(parameter.dtype).chunk(2)
            at += 2 * (stop - start)
            moments = [half[: part.stop - part.start] for half in halves]
            yield parameter, partial(span.cut, part), moments

    def _update(self, group: dict[str, Any], page: _Page, window: Tensor) -> None:
        weights, gradients, means, squares, steps = [], [], [], [], []
        for parameter, cut, moments in self._pieces(page, window):
            if not self.state[parameter]:  # as AdamW begins; what the store holds is of an earlier life
                for moment in moments:
                    moment.zero_()
            weights.append(cut(parameter))
            gradients.append(cut(parameter.grad))  # type: ignore[arg-type]
            means.append(moments[0])
            squares.append(moments[1])
            steps.append(self.state[parameter].get("step", _zero()).clone())
        beta1, beta2 = group["betas"]
        adamw(
            *(weights, gradients, means, squares, [], steps),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            foreach=group["foreach"],
        )

    def state_dict(self) -> dict[str, Any]:
        """AdamW's form: `step`, `exp_avg` and `exp_avg_sq` of each parameter that had a gradient, and the groups."""
        buffers = {store: store.buffer() for store in self._stores.values() if store.size}
        held = self.state
        self.state = {p: state | self._moments(p, buffers) for p, state in held.items() if state}  # type: ignore[assignment]
        try:
            return super().state_dict()
        finally:
            self.state = held

    def _moments(self, parameter: Tensor, buffers: Mapping[FileStore | HostStore, Any]) -> dict[str, Tensor]:
        if not parameter.numel():
            return {key: torch.zeros_like(parameter) for key in _MOMENTS}
        span = self._spans[parameter]
        shape = [parameter.shape[d] for d in span.order]
        back = [span.order.index(d) for d in range(parameter.dim())]
        return {
            key: torch.frombuffer(buffers[span.store], dtype=parameter.dtype, count=parameter.numel(), offset=offset)
            .view(shape)
            .permute(back)
            for key, offset in zip(_MOMENTS, (span.offset, span.offset + span.size), strict=True)
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state of this class or of AdamW, a chunk at a time.

        Raises OptimizerError, before anything is changed, for the state of another optimizer or of `amsgrad`.
        """
        groups = state_dict["param_groups"]
        numbers = list(chain.from_iterable(group["params"] for group in groups))
        own = dict(zip(numbers, self._parameters(), strict=False))
        found = {own[n]: state for n, state in state_dict["state"].items() if n in own}
        if any(group.get("amsgrad") for group in groups):
            raise OptimizerError("PagedAdamW has no amsgrad, which this state was made with. Go on with torch's AdamW.")
        for parameter, state in found.items():
            shapes = [tuple(state[key].shape) for key in _MOMENTS if key in state]
            if "step" not in state or shapes != 2 * [tuple(parameter.shape)]:
                raise OptimizerError(
                    f"This state has {', '.join(map(str, state)) or 'nothing'} with shapes {shapes} for a parameter of "
                    f"shape {tuple(parameter.shape)}. PagedAdamW goes on from states of AdamW for the same parameters."
                )
        ours = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
        steps = {n: {"step": torch.tensor(float(s["step"]))} for n, s in state_dict["state"].items() if n in own}
        super().load_state_dict({"state": steps, "param_groups": [group | ours for group in groups]})
        for page, window in self._pages(found):
            for parameter, cut, moments in self._pieces(page, window):
                for key, moment in zip(_MOMENTS, moments, strict=True):
                    moment.copy_(cut(found[parameter][key]))

    def __getstate__(self) -> dict[str, Any]:
        """Neither copied nor pickled: there is one file, and a copy would write over the other's moments."""
        raise OptimizerError(
            "PagedAdamW cannot be copied or pickled: its moments lie in one file. Build another and load state_dict()."
        )


def _zero() -> Tensor:
    return torch.tensor(0.0, dtype=torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32)


def _order(parameter: Tensor) -> tuple[int, ...]:
    """The dimensions, the outermost in memory first."""
    if type(parameter) not in (Tensor, torch.nn.Parameter) or parameter.layout != torch.strided:
        raise OptimizerError(
            f"PagedAdamW pages plain dense tensors, not a {type(parameter).__name__} with layout {parameter.layout}. "
            "Give it the plain parameters, before anything shards them."
        )
    order = tuple(sorted(range(parameter.dim()), key=parameter.stride, reverse=True))
    if not parameter.permute(order).is_contiguous():
        raise OptimizerError(
            f"A parameter of shape {tuple(parameter.shape)} and strides {parameter.stride()} does not fill its memory. "
            "Make it contiguous first."
        )
    return order
