"""Keys in front of attentions in a model's own code, which no registry knows.

While such a module's forward runs, a `TorchFunctionMode` sees its torch calls. The first product of data with data that
has the shapes of queries and keys gets the keys in front, whatever then meets the wider scores (masks, biases) gets
columns that let all through, and the first product after the softmax gets the values in front. The same is done to
`scaled_dot_product_attention`. No code here knows an architecture, so that none of this may be taken on trust: `check`
tries it on the model at hand, and a model whose code does something else on the way is refused.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from veneer.seams import anatomy, probe, transformers
from veneer.seams.widening import Call
from veneer.slots import Slots

PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm"}
SOFTMAX = {"softmax", "_softmax", "log_softmax"}
LOOKS = {"__get__", "size", "dim", "numel", "__len__", "type", "stride", "is_contiguous"}
Shape = tuple[int, ...]
Front = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""What gives the keys, the values and which rows see them, for a batch's own keys and values."""


class Widening(TorchFunctionMode):
    """One forward of one attention module of this shape: kv heads, width of a key, width of a value."""

    def __init__(self, module: nn.Module, shape: Shape, front: Front) -> None:
        super().__init__()
        self.module = module
        self.heads, self.key_width, self.value_width = shape
        self.front = front
        self.keys = self.added = 0
        self.values: Tensor | None = None
        self.softened = False
        self.wide: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "scaled_dot_product_attention":
            return self._fused(func, *args, **kwargs)
        if name in PRODUCTS and not self.added and self._is_scores(*_operands(name, args, kwargs)):
            return self._scores(func, name, args, kwargs)
        if not any(id(tensor) in self.wide for tensor in (*args, *kwargs.values()) if isinstance(tensor, Tensor)):
            return func(*args, **kwargs)
        if name in LOOKS:
            return func(*args, **kwargs)
        if name in PRODUCTS and self.softened and self.values is not None:
            return self._mixed(func, args, kwargs)
        return self._between(func, name, args, kwargs)

    def _made(self, like: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        keys = like.new_empty(batch, self.heads, 0, self.key_width)
        return self.front(keys, like.new_empty(batch, self.heads, 0, self.value_width))

    def _fused(
        self, func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        keys, values, seen = self._made(key, len(key))
        added = keys.shape[2]
        if added:
            positional = len(args) > 1
            causal = args[1] if positional else kwargs.get("is_causal", False)
            call = Call("sdpa", self.module, query, key, added, seen, {"is_causal": causal})
            attn_mask = call.widened(attn_mask)
            args = (args[0], False, *args[2:]) if positional else args
            kwargs = kwargs if positional else {**kwargs, "is_causal": False}
            key, value = _joined(keys, key), _joined(values, value)
        output: Tensor = func(query, key, value, attn_mask, *args, **kwargs)
        return output

    def _is_scores(self, query: Any, key: Any) -> bool:
        if not isinstance(query, Tensor) or not isinstance(key, Tensor) or key.ndim not in (3, 4):
            return False
        heads = key.shape[1] == self.heads if key.ndim == 4 else key.shape[0] % self.heads == 0
        return heads and query.ndim == key.ndim and query.shape[-1] == key.shape[-2] == self.key_width

    def _scores(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        query, key = _operands(name, args, kwargs)
        batch = len(key) if key.ndim == 4 else len(key) // self.heads
        keys, self.values, seen = self._made(key, batch)
        self.keys, self.added = key.shape[-1], keys.shape[2]
        if not self.added:
            output: Tensor = func(*args, **kwargs)
            return output
        keys = keys if key.ndim == 4 else keys.flatten(0, 1)
        wide = torch.cat([keys.transpose(-1, -2), key], -1)
        if name == "baddbmm":
            bias = kwargs["input"] if "input" in kwargs else args[0]
            bias = F.pad(bias, (self.added, 0)) if bias.shape[-1] == self.keys else bias
            scores = torch.baddbmm(bias, query, wide, **{k: v for k, v in kwargs.items() if k in ("beta", "alpha")})
        else:
            scores = torch.matmul(query, wide)
        if seen is not None:
            hidden = ~F.pad(seen, (0, self.keys), value=True)
            hidden = hidden[:, None, None] if key.ndim == 4 else hidden.repeat_interleave(self.heads, 0)[:, None]
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        return self._mark(scores)

    def _mixed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and id(x) not in self.wide)
        if value.ndim not in (3, 4) or value.shape[-2] != self.keys:
            return func(*args, **kwargs)
        assert self.values is not None
        front, self.values = self.values, None
        wide = torch.cat([front if value.ndim == 4 else front.flatten(0, 1), value], -2)
        self.wide.clear()

        def swap(x: Any) -> Any:
            return wide if x is value else x

        return func(*map(swap, args), **{key: swap(x) for key, x in kwargs.items()})

    def _between(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on the wider scores: its other operands get columns, and a shape named for them is named wider."""

        def fit(x: Any) -> Any:
            if isinstance(x, Tensor) and id(x) not in self.wide and x.ndim > 1 and x.shape[-1] == self.keys > 1:
                chooses_scores = x.dtype == torch.bool and name == "where"
                return F.pad(x, (self.added, 0), value=chooses_scores)
            return x

        if name in ("view", "reshape"):
            sizes = list(args[1] if isinstance(args[1], (tuple, list)) else args[1:])
            sizes[-1] = self.keys + self.added if sizes[-1] == self.keys else sizes[-1]
            output = func(args[0], *sizes)
        else:
            output = func(*map(fit, args), **{key: fit(x) for key, x in kwargs.items()})
        self.softened |= name in SOFTMAX
        is_wide = isinstance(output, Tensor) and output.ndim > 2 and output.shape[-1] == self.keys + self.added
        return self._mark(output) if is_wide else output

    def _mark(self, scores: Tensor) -> Tensor:
        self.wide[id(scores)] = scores  # kept alive, so that no other tensor gets its id
        return scores


def _joined(front: Tensor, own: Tensor) -> Tensor:
    """One in front of the other; code may repeat the heads that queries share in one call and not in the next."""
    heads = max(front.shape[1], own.shape[1])
    return torch.cat([x.repeat_interleave(heads // x.shape[1], 1) for x in (front, own)], dim=2)


def _operands(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """What a product multiplies."""
    given = [*args, *(kwargs[key] for key in ("input", "batch1", "batch2", "mat2", "other") if key in kwargs)]
    given = given[1:] if name == "baddbmm" else given
    return (given[0], given[1]) if len(given) > 1 else (None, None)


def enter(module: nn.Module, args: Any, shape: Shape, front: Front, open_: list[Widening]) -> None:
    """A forward pre-hook: the module's calls are seen from here on."""
    mode = Widening(module, shape, front)
    mode.__enter__()  # type: ignore[no-untyped-call]
    open_.append(mode)


def leave(module: nn.Module, args: Any, output: Any, open_: list[Widening]) -> None:
    """The forward hook to `enter`, called on errors too."""
    open_.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


_CHECKED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def check(model: nn.Module, shapes: Mapping[str, Shape]) -> str:
    """Why these attentions cannot have keys in front, found by trying it once; the empty string where they can.

    Keys in front may come in any order, must let no later token through to an earlier output, and each must count. On
    the meta device nothing is computed, so that nothing can be tried, and nothing can go wrong.
    """
    if next(model.parameters()).is_meta or not shapes:
        return ""
    if model not in _CHECKED:
        with anatomy.at_rest(model), transformers.without_dropout(model):
            try:
                _CHECKED[model] = _try(model, shapes)
            except Exception as error:  # whatever a model's code raises on scores wider than it expects
                _CHECKED[model] = f"its code stops with {type(error).__name__}: {error}"
    return _CHECKED[model]


def _try(model: nn.Module, shapes: Mapping[str, Shape]) -> str:
    weight = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    slots = {}
    for path, (heads, *widths) in shapes.items():
        numbers = [torch.randn(heads, 3, width, generator=generator) for width in widths]
        key, value = (x.to(weight.device, torch.promote_types(weight.dtype, x.dtype)) for x in numbers)
        slots[path] = Slots(key, value)
    trained = [p for one in slots.values() for p in one.parameters()]
    inputs = {name: tensor.to(weight.device) for name, tensor in probe.inputs(model).items()}
    changed = dict(inputs)
    last = next((name for name in ("decoder_input_ids", "input_ids") if name in inputs), None)
    if last:
        changed[last] = inputs[last].clone()
        changed[last][:, -1] += 1
    with torch.no_grad():
        base, base_changed = _output(model, inputs), _output(model, changed)
    with _in_front(model, shapes, slots), torch.enable_grad():
        wide = _output(model, inputs)
        gradients = torch.autograd.grad(wide.float().pow(2).sum(), trained, allow_unused=True)
        with torch.no_grad():
            wide_changed = _output(model, changed)
            for parameter in trained:
                parameter.copy_(parameter.flip(1))
            turned = _output(model, inputs)
    near = functools.partial(_near, tolerance=1e-3 if weight.dtype.itemsize > 2 else 5e-2)
    if any(g is None or not bool(g.abs().amax((0, 2)).gt(0).all()) for g in gradients) or near(wide, base):
        return "not every key in front reaches the output"
    if not near(wide, turned):
        return "the order of the keys in front changes the output"
    causal = last and base.ndim > 2 and near(base[:, :-1], base_changed[:, :-1]) and not near(base, base_changed)
    if causal and not near(wide[:, :-1], wide_changed[:, :-1]):
        return "with keys in front a later token changes an earlier output"
    return ""


def _near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).abs().max() <= tolerance * one.abs().max())


def _output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**inputs, return_dict=False, **transformers.without_cache(model))[0]
    return output


@contextmanager
def _in_front(model: nn.Module, shapes: Mapping[str, Shape], slots: Mapping[str, Slots]) -> Iterator[None]:
    """Within, these slots stand in front at their modules."""
    open_: list[Widening] = []
    hooks = []
    for path, one in slots.items():
        front = functools.partial(_all_see, one)
        module = model.get_submodule(path)
        hooks.append(
            module.register_forward_pre_hook(functools.partial(enter, shape=shapes[path], front=front, open_=open_))
        )
        hooks.append(module.register_forward_hook(functools.partial(leave, open_=open_), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _all_see(slots: Slots, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*slots(k, v), None)
