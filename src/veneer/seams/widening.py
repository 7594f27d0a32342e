"""The mask of an attention whose keys grew in front, in whatever form its implementation takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.errors import RoutingError, VeneerError


@dataclass
class Call:
    """One attention that gets `added` more keys in front, which every query sees, or those of the rows in `seen`."""

    implementation: str
    module: Any
    query: Tensor
    key: Tensor
    added: int
    seen: Tensor | None
    kwargs: dict[str, Any]

    def widened(self, mask: Any) -> Any:
        """The mask for the wider keys, in whatever form this implementation takes it."""
        if self.kwargs.get("cache") is not None or self.kwargs.get("block_table") is not None:
            raise VeneerError(
                "Keys in front of a paged cache (continuous batching) would be written into it. Generate with "
                "model.generate and a dynamic or static cache."
            )
        if "flash" in self.implementation:
            self._check_flash(mask)
        if mask is None:
            mask = self._explicit()
        if isinstance(mask, Tensor):
            return self._columns(mask)
        return mask if mask is None else self._block_mask(mask)

    def _explicit(self) -> Tensor | None:
        """The mask that no mask stands for; None where it may stay away."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        causal = self.kwargs.get("is_causal")
        causal = getattr(self.module, "is_causal", True) if causal is None else causal
        if self.implementation == "sdpa" and causal and queries > 1:
            lower: Tensor = self.query.new_ones(queries, keys, dtype=torch.bool).tril()
            return lower[None, None]
        if self.seen is None:
            return None
        if "flash" in self.implementation:
            return self.query.new_ones(len(self.key), keys, dtype=torch.long)
        if self.implementation == "sdpa":
            return self.query.new_ones(1, 1, queries, keys, dtype=torch.bool)
        if self.implementation not in ("eager", "flex_attention"):
            raise RoutingError(
                f"The attention implementation '{self.implementation}' was called without a mask, so rows cannot "
                "differ in what they see. Load the model with attn_implementation='sdpa' or 'eager'."
            )
        return self.query.new_zeros(1, 1, queries, keys)

    def _columns(self, mask: Tensor) -> Tensor:
        """More columns on the left: True, 0 where the mask is added to the scores, 1 where it marks tokens."""
        if mask.shape[-1] == 1:
            mask = mask.expand(*mask.shape[:-1], self.key.shape[2])
        added_to_scores = mask.is_floating_point() and mask.ndim > 2
        shown = 0.0 if added_to_scores else 1
        if self.seen is None:
            return F.pad(mask, (self.added, 0), value=shown)
        hidden = torch.finfo(mask.dtype).min if added_to_scores else 0
        front = mask.new_full(self.seen.shape, shown).masked_fill(~self.seen, hidden)
        batch = len(self.seen)
        front = front.view(batch, *[1] * (mask.ndim - 2), self.added).expand(batch, *mask.shape[1:-1], self.added)
        wide: Tensor = torch.cat([front, mask.expand(batch, *mask.shape[1:])], dim=-1)
        return wide

    def _block_mask(self, mask: Any) -> Any:
        """flex_attention's mask, made again for the wider keys; the layers of one forward share one mask."""
        from torch.nn.attention.flex_attention import create_block_mask

        added, seen, own = self.added, self.seen, mask.mask_mod
        alike = seen is None and not torch.compiler.is_compiling()
        memo: dict[int, Any] = vars(mask).setdefault("_widened", {}) if alike else {}
        if added not in memo:

            def mask_mod(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
                front = kv < added
                shown = front if seen is None else front & seen[batch, kv.clamp(max=added - 1)]
                below: Tensor = ~front & own(batch, head, q, (kv - added).clamp(min=0))
                return shown | below

            batch, heads = mask.shape[:2]
            queries, keys = mask.seq_lengths
            memo[added] = create_block_mask(
                mask_mod,
                B=batch if seen is None else len(seen),
                H=heads if heads > 1 else None,
                Q_LEN=queries,
                KV_LEN=keys + added,
                device=str(self.query.device),
                BLOCK_SIZE=mask.BLOCK_SIZE,
            )
        return memo[added]

    def _check_flash(self, mask: Any) -> None:
        """Refuse what flash attention reads off the position of a key, which keys in front would shift."""
        advice = "Load the model with attn_implementation='sdpa'."
        window = self.kwargs.get("sliding_window")
        keys = self.key.shape[2] + self.added
        if window is not None and keys > window:
            raise VeneerError(
                f"Flash attention would let {self.added} keys in front slide out of its window of {window}. {advice}"
            )
        if keys == self.query.shape[2] and mask is not None:
            raise VeneerError(
                f"Flash attention would take {keys} keys, {self.added} of them in front, for those of the queries. "
                f"{advice}"
            )
        positions = self.kwargs.get("position_ids")
        joined = mask is None and positions is not None and len(self.query) == 1 and bool((positions.diff() != 1).any())
        if joined or self.kwargs.get("cu_seq_lens_q") is not None:
            raise VeneerError(f"Flash attention over packed sequences cannot put keys in front of each. {advice}")
