"""The `Input` port where a delta puts positions in front: hooks on the stack that turns embeddings into hidden states.

The stack is the innermost module that holds the token embedding and takes `inputs_embeds` and `attention_mask`. Before
its forward, ids become embeddings with the new positions in front, and mask, positions and token types grow along;
after it the answer is cut back to the tokens, so that heads, labels and losses need nothing. Where a module inside the
stack holds all blocks, its answer is cut already there: a pooler then reads the first token and not the first slot.

Slots stand directly before the first token that the mask shows, behind padding on the left; rows with fewer slots than
others are padded on the left with hidden ones. So distances and positions are those of the row alone.

A cache holds the slots once, while `generate` counts tokens: at every step the mask grows and positions shift. The
slots of an encoder are left in what it returns, and the mask of the cross-attention grows by them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer import fronts, site
from veneer.delta import Input, Source
from veneer.errors import RoutingError, VeneerError
from veneer.seams.transformers import is_pretrained

_TAKEN = {"input_ids", "inputs_embeds", "attention_mask"}


def sources(model: Any, table: str, tables: Iterable[str], blocks: Iterable[str]) -> dict[str, Source]:
    """The stack above the token embedding at path `table`, and what goes with it; empty where there is none.

    "stack" turns embeddings into hidden states, "table" is the embedding, "body" the module inside the stack that holds
    all blocks, "cross" the decoder that attends to what the stack returns. Ids that a second table reads would need
    slots there, too, so such a stack is none.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    if not is_pretrained(model):
        return {}
    path = next((above for alias in _aliases(named, table) for above in _above(alias) if _is_stack(named[above])), None)
    if path is None or sum(_inside(other, path) for other in tables) > 1:
        return {}
    found = {"stack": Source(path, named[path], "inputs_embeds"), "table": Source(table, named[table], 0)}
    if model.config.is_encoder_decoder and named[path] is model.get_encoder():
        return {**found, "cross": Source("", model.get_decoder(), "encoder_hidden_states")}
    lists = [block.rpartition(".")[0] for block in blocks if _inside(block, path)]
    body = _common(lists)
    if body != path and not isinstance(named[body], nn.ModuleList):
        found["body"] = Source(body, named[body], 0)
    return found


def _aliases(named: dict[str, nn.Module], path: str) -> list[str]:
    return [other for other, module in named.items() if module is named[path]]


def _above(path: str) -> Iterator[str]:
    """The paths of the modules that hold this one, the innermost first."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _inside(path: str, module: str) -> bool:
    return path.startswith(f"{module}." if module else "")


def _common(paths: list[str]) -> str:
    """The path of the innermost module that holds every module of these paths."""
    parents = [path.split(".")[:-1] for path in paths]
    same = 0
    while parents and all(len(parent) > same and parent[same] == parents[0][same] for parent in parents):
        same += 1
    return ".".join(parents[0][:same]) if parents else ""


def _is_stack(module: nn.Module) -> bool:
    names = set(_names(module))
    return names >= _TAKEN and "decoder_input_ids" not in names


def _names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


@dataclass
class _Passage:
    """What the hook before the stack tells those after it: how many positions came in front, and the length then."""

    added: int = 0
    length: int = 0


def hooks(module: nn.Module, here: site.Site) -> list[RemovableHandle]:
    """Register the hooks that the `Input` deltas of this site need on the stack and what goes with it."""
    bound = {
        name: source.module
        for bindings in here.bindings.values()
        for binding in bindings
        for name, source in binding.sources.items()
    }
    deltas = [delta for here_too in here.values() for delta in cast(nn.ModuleList, here_too)]
    if "stack" not in bound or not any(isinstance(delta, Input) and delta.slots for delta in deltas):
        return []
    passage, stack = _Passage(), _Stack.of(bound["stack"], bound["table"])
    before = functools.partial(_before, here=here, passage=passage, stack=stack)
    handles = [stack.module.register_forward_pre_hook(before, with_kwargs=True)]
    if "cross" in bound:
        cross = functools.partial(_before_cross, here=here, names=_names(bound["cross"]))
        return [*handles, bound["cross"].register_forward_pre_hook(cross, with_kwargs=True)]
    after = functools.partial(_after, passage=passage)
    return handles + [bound[name].register_forward_hook(after) for name in ("stack", "body") if name in bound]


site.hooks_by_port[Input] = hooks


@dataclass(frozen=True)
class _Stack:
    """The stack with what is read off it once.

    `first` is the position that a model itself gives to the first token it shows, where it counts those; None where it
    counts all. `absolute` says that an embedding of positions is added to that of the tokens.
    """

    module: nn.Module
    table: nn.Module
    names: tuple[str, ...]
    first: int | None
    absolute: bool

    @classmethod
    def of(cls, module: nn.Module, table: Any) -> _Stack:
        others = [
            other
            for other in module.modules()
            if isinstance(other, nn.Embedding) and other is not table and other.embedding_dim == table.embedding_dim
        ]
        padded = [other.padding_idx for other in others if other.padding_idx is not None]
        return cls(module, table, _names(module), padded[0] + 1 if padded else None, bool(others))


@dataclass(frozen=True)
class _Slots:
    """The slots of one forward: how many, `shown[row, slot]` whether a row has one (None: all), and `idle`, which is
    how many of them no row needs once each row's own stand beside its tokens."""

    total: int
    idle: int
    shown: Tensor | None

    @property
    def added(self) -> int:
        return self.total - self.idle

    @property
    def counts(self) -> int | Tensor:
        """How many each row has: one number, or [batch, 1]."""
        return self.total if self.shown is None else self.shown.sum(1, keepdim=True)


def _slots(here: site.Site, batch: Tensor) -> _Slots:
    acting = fronts.slots(here, batch)
    total = sum(slots for slots, _ in acting)
    if all(rows is None for _, rows in acting):
        return _Slots(total, 0, None)
    sets = [(slots, None if rows is None else frozenset(rows)) for slots, rows in reversed(acting)]
    shown = [[rows is None or row in rows for slots, rows in sets for _ in range(slots)] for row in range(len(batch))]
    return _Slots(total, total - max(map(sum, shown)), torch.tensor(shown, device=batch.device))


def _order(slots: _Slots, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Where each position of [slots, tokens] goes: hidden slots and padding on the left first; None to keep all."""
    if mask is None and slots.shown is None:
        return None
    tokens = like.new_ones(like.shape[:2], dtype=torch.bool) if mask is None else mask.cumsum(-1) > 0
    shown = tokens.new_ones(len(tokens), slots.total) if slots.shown is None else slots.shown
    keys = torch.cat([shown, tokens], dim=1).to(torch.int8)
    return keys.argsort(dim=1, stable=True)[:, slots.idle :]


def _joined(front: Tensor, tokens: Tensor, order: Tensor | None) -> Tensor:
    """[..., slots] and [..., tokens] in order."""
    whole = torch.cat([front.expand(*tokens.shape[:-1], -1), tokens], dim=-1)
    return (
        whole
        if order is None
        else whole.expand(*whole.shape[:-2], *order.shape[:-1], -1).gather(
            -1, order.expand(*whole.shape[:-2], *order.shape)
        )
    )


def _before(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], here: site.Site, passage: _Passage, stack: _Stack
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    given = {**dict(zip(stack.names, args, strict=False)), **kwargs}
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    tokens = cast(Tensor, embeddings if ids is None else ids)
    passage.added = 0
    slots = _slots(here, tokens)
    if not slots.total:
        return None
    cache = given.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    mask = _plain(given.get("attention_mask"), cache)
    if mask is None and slots.shown is not None:
        seen = past + tokens.shape[1] - slots.added if past else tokens.shape[1]
        mask = tokens.new_ones(len(tokens), seen, dtype=torch.long)
    if not past:
        mask = None if mask is None else mask[:, : tokens.shape[1]]
        _make_room(cache, slots.added, module)
    _check(slots, mask, cache, past, tokens.shape[1])
    order = _order(slots, mask, tokens)
    given["attention_mask"] = None if mask is None else _joined(_shown(slots, mask), mask, order)
    _place(given, stack, slots, tokens, order, mask, past)
    if past:
        return (), given
    if given.get("token_type_ids") is not None:
        types = given["token_type_ids"]
        given["token_type_ids"] = _joined(types.new_zeros(slots.total), types, order)
    whole = fronts.in_front(here, ids, stack.table(ids) if embeddings is None else embeddings)
    if order is not None:
        whole = whole.gather(1, order[..., None].expand(-1, -1, whole.shape[-1]))
    given |= {"input_ids": None, "inputs_embeds": whole}
    passage.added, passage.length = slots.added, whole.shape[1]
    return (), given


def _shown(slots: _Slots, mask: Tensor) -> Tensor:
    return mask.new_ones(slots.total) if slots.shown is None else slots.shown.to(mask.dtype)


def _plain(mask: Any, cache: Any) -> Tensor | None:
    """The mask as [batch, tokens]: of what `generate` prepares for a static cache, what the last query sees."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    if not isinstance(mask, Tensor) or cache is None or not cache.is_compileable:
        raise VeneerError(
            "Nothing can be put in front of the tokens under a mask over queries and keys, which does not say what new "
            "positions see. Pass attention_mask as [batch, length]."
        )
    last = mask[:, 0, -1]
    return (last == 0 if last.is_floating_point() else last).long()


def _check(slots: _Slots, mask: Tensor | None, cache: Any, past: int, length: int) -> None:
    """Refuse a cache that does not hold these slots, or that has let go of them."""
    if cache is None or mask is None:
        return
    if not cache.is_compileable:
        if past and mask.shape[1] + slots.added != past + length:
            raise VeneerError(
                f"The cache holds {past} positions, but the mask counts {mask.shape[1] - length} tokens before these, "
                f"and the adapters put {slots.added} positions in front. Start with an empty cache and keep the "
                "same adapters."
            )
        return
    layers = _layers(cache)
    held = past + length + (0 if past else slots.added)
    if all(layer.is_sliding for layer in layers) and held > layers[0].max_cache_len:
        raise VeneerError(
            f"A static cache whose layers all slide, over {layers[0].max_cache_len} positions, does not say which of "
            f"{held} are padding, so nothing can be put in front. Use the dynamic cache."
        )


def _layers(cache: Any) -> list[Any]:
    """The layers of a cache for self-attention."""
    return list(getattr(cache, "self_attention_cache", cache).layers)


def _place(
    given: dict[str, Any],
    stack: _Stack,
    slots: _Slots,
    tokens: Tensor,
    order: Tensor | None,
    mask: Tensor | None,
    past: int,
) -> None:
    """Positions for slots and tokens, where the model is told them, or would count hidden slots."""
    positions = given.get("position_ids")
    if positions is None:
        if slots.shown is None and stack.first is None:
            return
        if "position_ids" not in stack.names:
            if stack.absolute:
                raise RoutingError(
                    f"{type(stack.module).__name__} counts positions itself, so rows cannot have different numbers of "
                    "positions in front. Run the rows apart."
                )
            return
        length = tokens.shape[1] + (past or slots.added)
        shown = tokens.new_ones(len(tokens), length) if mask is None else given["attention_mask"]
        counted = (shown.long().cumsum(-1) - 1).clamp(min=0) + (stack.first or 0)
        given["position_ids"] = counted[:, -tokens.shape[1] - (0 if past else slots.added) :]
        return
    if past:
        given["position_ids"] = positions + slots.counts
        return
    if mask is None:
        start = positions[..., :1]
    else:
        first = (mask.cumsum(-1) == 0).sum(-1, keepdim=True).clamp(max=positions.shape[-1] - 1)
        positions = positions.expand(*positions.shape[:-2], len(tokens), -1)
        start = positions.gather(-1, first.expand(*positions.shape[:-1], 1))
    ranks = torch.arange(slots.total, device=positions.device) if slots.shown is None else slots.shown.cumsum(-1) - 1
    given["position_ids"] = _joined(start + ranks.clamp(min=0), positions + slots.counts, order)


def _make_room(cache: Any, added: int, stack: Any) -> None:
    """A static cache that is not yet laid out gets `added` more positions; `generate` made it for the tokens."""
    if cache is None or not cache.is_compileable:
        return
    window = getattr(stack.config.get_text_config(decoder=True), "sliding_window", None)
    for layer in _layers(cache):
        if not layer.is_initialized:
            longer = layer.max_cache_len + added
            layer.max_cache_len = min(longer, window) if layer.is_sliding else longer


def _after(module: nn.Module, args: tuple[Any, ...], output: Any, passage: _Passage) -> Any:
    return _cut(output, passage) if passage.added else output


def _cut(output: Any, passage: _Passage) -> Any:
    """Hidden states [batch, length, width] without the positions in front; attentions keep theirs."""
    if isinstance(output, Tensor):
        whole = output.ndim == 3 and output.shape[1] == passage.length
        return output[:, passage.added :] if whole else output
    if isinstance(output, dict):
        for name, value in list(output.items()):
            output[name] = _cut(value, passage)
        return output
    return tuple(_cut(value, passage) for value in output) if isinstance(output, tuple) else output


def _before_cross(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], here: site.Site, names: tuple[str, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The decoder's mask over what the encoder returned."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
    if states is None:
        return None
    slots = _slots(here, states)
    if mask is None and slots.shown is not None:
        mask = states.new_ones(len(states), states.shape[1] - slots.added, dtype=torch.long)
    if mask is None or mask.shape[-1] + slots.added != states.shape[1]:
        return None
    given["encoder_attention_mask"] = _joined(_shown(slots, mask), mask, _order(slots, mask, mask))
    return (), given
