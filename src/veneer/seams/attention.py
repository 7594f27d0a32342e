"""The `KeyValue` port: one wrap of transformers' attention registry, through which every attention module passes.

A name of our own in the registry would lose the modules' local eager functions and their masks (a name the mask
registry does not know gets no mask at all); replacing modules would change the base. So the lookup itself is wrapped
once, and a module without a site, or whose site has nothing to say, gets what it got before.

Keys in front are seen by every query, so a mask grows by columns that let all through. Where transformers leaves the
mask out and means "causal", an explicit one must be made: with more keys than queries its scaled-dot-product route
drops the last keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import site
from veneer.delta import KeyValue
from veneer.errors import VeneerError

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


site.hooks_by_port[KeyValue] = ensure_wrapped


def _get_interface(registry: Any, implementation: Any, default: Any) -> Callable[..., Any]:
    assert _original is not None
    return functools.partial(_attend, _original(registry, implementation, default))


def _attend(
    attend: Callable[..., Any],
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
    wide_key, wide_value = site.key_value(here, key, value)
    added = wide_key.shape[2] - key.shape[2]
    if added:
        attention_mask = _widened(module, query, key, attention_mask, added, kwargs)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = F.pad(kwargs["position_bias"], (added, 0))
    return attend(module, query, wide_key, wide_value, attention_mask, *args, **kwargs)


def _widened(module: Any, query: Tensor, key: Tensor, mask: Any, added: int, kwargs: dict[str, Any]) -> Any:
    """The mask for `added` more keys in front, which every query sees."""
    if kwargs.get("cache") is not None:
        raise VeneerError("Keys in front of a paged cache would be written into it. Use another cache.")
    if isinstance(mask, Tensor):
        seen = True if mask.dtype == torch.bool else 0.0 if mask.is_floating_point() else 1
        return F.pad(mask, (added, 0), value=seen)
    if mask is not None:
        raise VeneerError(
            f"A {type(mask).__name__} mask cannot be widened. "
            "Load the model with attn_implementation='sdpa' or 'eager'."
        )
    causal = kwargs.get("is_causal")
    causal = module.is_causal if causal is None else causal
    if causal and query.shape[2] > 1 and module.config._attn_implementation == "sdpa":
        lower = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        return F.pad(lower, (added, 0), value=True)[None, None]
    return None
