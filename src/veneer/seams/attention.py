"""The `KeyValue` port: one wrap of transformers' attention registry, through which every attention module passes.

A name of our own in the registry would lose the modules' local eager functions and their masks (a name the mask
registry does not know gets no mask at all); replacing modules would change the base. So the lookup itself is wrapped
once, and a module without a site, or whose site has nothing to say, gets what it got before.

Keys in front are seen by every query, so a mask grows by columns that let all through. Where transformers leaves the
mask out and means "causal", an explicit one must be made: with more keys than queries its scaled-dot-product route
drops the last keys. Attentions that a model returns or records have the columns of the keys in front, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer import fronts, site
from veneer.delta import KeyValue
from veneer.seams import positions, written
from veneer.seams.widening import Call

_original: Callable[..., Any] | None = None


def wrap() -> None:
    """Wrap the registry; a second call does nothing."""
    global _original
    from transformers.modeling_utils import AttentionInterface

    if _original is None:
        _original = AttentionInterface.get_interface
        AttentionInterface.get_interface = _get_interface  # type: ignore[method-assign, assignment]


def unwrap() -> None:
    """Put the registry back as it was."""
    global _original
    from transformers.modeling_utils import AttentionInterface

    if _original is not None:
        AttentionInterface.get_interface = _original  # type: ignore[method-assign]
        _original = None


def ensure_wrapped(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook: a model unpickled in another process brings its wrap along."""
    wrap()


def hooks(module: nn.Module, here: site.Site) -> list[RemovableHandle]:
    """The hooks of a module whose keys and values change: through the registry, or in the model's own code."""
    own = next((b.attends for bindings in here.bindings.values() for b in bindings if b.attends), None)
    moved = positions.hooks(here)
    if own is None:
        return [module.register_forward_pre_hook(ensure_wrapped), *moved]
    open_: list[written.Widening] = []
    front = functools.partial(fronts.key_value, here)
    return [
        module.register_forward_pre_hook(functools.partial(written.enter, shape=own, front=front, open_=open_)),
        module.register_forward_hook(functools.partial(written.leave, open_=open_), always_call=True),
        *moved,
    ]


site.hooks_by_port[KeyValue] = hooks


def _get_interface(registry: Any, implementation: Any, default: Any) -> Callable[..., Any]:
    assert _original is not None
    return functools.partial(_attend, _original(registry, implementation, default), implementation)


def _attend(
    attend: Callable[..., Any],
    implementation: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    here = site.of(module)
    if here is None:
        return attend(module, query, key, value, attention_mask, *args, **kwargs)
    wide_key, wide_value, seen = fronts.key_value(here, key, value)
    added = wide_key.shape[2] - key.shape[2]
    if added:
        call = Call(implementation or "eager", module, query, key, added, seen, kwargs)
        attention_mask = call.widened(attention_mask)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = F.pad(kwargs["position_bias"], (added, 0))
    output = attend(module, query, wide_key, wide_value, attention_mask, *args, **kwargs)
    for slots_key, slots_value, rows in fronts.apart(here, key, value):
        mine = query if rows is None else query.index_select(0, rows)
        more = F.scaled_dot_product_attention(
            mine, slots_key, slots_value, scale=kwargs.get("scaling"), enable_gqa=query.shape[1] != key.shape[1]
        ).transpose(1, 2)
        mixed, *others = output
        more = more.reshape(len(mine), *mixed.shape[1:])
        output = (mixed + more if rows is None else mixed.index_add(0, rows, more), *others)
    return output
