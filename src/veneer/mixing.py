"""Rows of one batch under different adapters, as a few batched products instead of one pass for each adapter.

Where all that acts after a module only adds s·x·Aᵀ·Bᵀ (`After.pair`), rows are put together by adapter in tiles of
equal size, and one batched product by the stacked A, [tiles, rank, in], and one by the stacked B, [tiles, out, rank],
serve them all. Ranks are padded with zeros to the largest. Without gradients the stacks are kept for as long as the mix
of rows and the adapters' tensors stay. On a CPU a loop over the rows in C takes their place, which reads each adapter's
A and B where they are; on CUDA so do two launches of Triton, where they are faster (`ops/kernels.py`).

In a graph of `torch.compile` nothing may depend on who is served: every row picks its A and B by an index tensor from
those of all adapters at the module, so another mix, or other numbers in an adapter, run the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.delta import After, Span
from veneer.ops import kernels, lora_cpu


class Mix:
    """Which adapters serve which row.

    `able` are all that could, in order, `acting` those of them that do, and `rows` where; `index` [rows, deepest stack]
    says the same by their numbers, where len(able) stands for none. It is `uniform` where all rows have the same.
    """

    def __init__(self, able: Sequence[str], rows: Sequence[Sequence[str]], device: torch.device) -> None:
        self.able = tuple(able)
        self.rows = tuple(tuple(name for name in row if name in able) for row in rows)
        self.acting = tuple(name for name in able if any(name in row for row in self.rows))
        self.uniform = len(set(self.rows)) == 1
        number = {name: place for place, name in enumerate(able)}
        depth = max(1, *map(len, self.rows))
        none = [len(able)] * depth
        self.index = torch.tensor([[*map(number.__getitem__, row), *none][:depth] for row in self.rows], device=device)
        self._kept: dict[str, _Kept] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own stacks."""
        return {**vars(self), "_kept": {}}

    def forget(self) -> None:
        """Look anew at what acts where."""
        self._kept.clear()

    def groups(self, path: str, training: bool, find: Callable[[], list[Group] | None]) -> list[Group] | None:
        """What `find` finds for the module of this path, anew only where its deltas or their tensors changed."""
        known = self._kept.get(path)
        if known is not None and known.holds(training):
            return known.groups
        with torch.no_grad():
            found = find()
        self._kept[path] = _Kept(found, training)
        return found


@dataclass
class Group:
    """The deltas of each adapter that change the same columns of the same output of one module."""

    spans: tuple[Span, ...] | None
    item: int | str | None
    members: dict[str, list[After]] = field(default_factory=dict)
    tiles: dict[Any, list[_Tiles]] = field(default_factory=dict)
    direct: dict[Any, Any] = field(default_factory=dict)
    copied: bool = False
    """Whether something here holds numbers of its own, made from those of the deltas."""

    def add(self, mix: Mix, repeats: int, x: Tensor, y: Tensor) -> Tensor:
        """y [batch, ..., out] with what each row's adapters add for its x [batch, ..., in].

        The batch has `repeats` rows for each row of the mix, side by side.
        """
        x = x.to(y.dtype)
        if torch.compiler.is_compiling():
            return self._by_row(mix, repeats, x, y)
        if not torch.is_grad_enabled():
            found = self._at_once(mix, repeats, x, y)
            if found is not None:
                return found
        return self._by_tiles(mix, repeats, x, y)

    def _at_once(self, mix: Mix, repeats: int, x: Tensor, y: Tensor) -> Tensor | None:
        """By what reads each A and B where it lies; None where there is nothing for these."""
        triton = kernels.wanted("grouped_triton.Mixed", (x, y))
        key = repeats, triton
        if key not in self.direct:
            self.direct[key] = self._direct(mix, repeats, triton)
        direct = self.direct[key]
        if not triton or direct is None:
            return None if direct is None else direct.beside(x, y)
        tokens = kernels.counted(x.numel() // x.shape[-1])
        kind = ("mixed", y.device, y.dtype, tokens, x.shape[-1], y.shape[-1], *direct.sizes)
        return kernels.faster(kind, lambda: direct.beside(x, y), lambda: self._by_tiles(mix, repeats, x, y))

    def _by_tiles(self, mix: Mix, repeats: int, x: Tensor, y: Tensor) -> Tensor:
        for tiles in self._tiles(mix, repeats, y):
            y = tiles.add(x, y)
        return y

    def _tiles(self, mix: Mix, repeats: int, y: Tensor) -> list[_Tiles]:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors()):
            mix.forget()  # they are about to be trained
            return self._tiled(mix, repeats, y)
        key = repeats, y.dtype, y.device, torch.is_inference_mode_enabled()
        if key not in self.tiles:
            self.copied = True
            with torch.no_grad():
                self.tiles[key] = self._tiled(mix, repeats, y)
        return self.tiles[key]

    def tensors(self) -> list[Tensor]:
        """All that the deltas hold."""
        deltas = [delta for found in self.members.values() for delta in found]
        return [tensor for delta in deltas for tensor in (*delta.parameters(), *delta.buffers())]

    def _tiled(self, mix: Mix, repeats: int, y: Tensor) -> list[_Tiles]:
        rows = [[name for name in row if name in self.members] for row in mix.rows]
        pairs = {name: _pair(self.members[name], y) for name in {name for row in rows for name in row}}
        found = []
        for depth in range(max(map(len, rows))):
            served: dict[str, list[int]] = {}
            for number, row in enumerate(rows):
                if depth < len(row):
                    served.setdefault(row[depth], []).extend(range(number * repeats, (number + 1) * repeats))
            found.append(_Tiles.of(pairs, served, y.device))
        return found

    def _direct(self, mix: Mix, repeats: int, triton: bool) -> Any:
        pairs: list[tuple[Tensor, Tensor, float]] = []
        numbers: dict[str, range] = {}
        for name, deltas in self.members.items():
            found = [pair for pair in (delta.pair() for delta in deltas) if pair is not None]
            if triton:
                found = [(A.float().contiguous(), B.float().contiguous(), scale) for A, B, scale in found]
            numbers[name] = range(len(pairs), len(pairs) + len(found))
            pairs += found
        own = set(map(id, self.tensors()))
        self.copied |= any(id(factor) not in own for A, B, _ in pairs for factor in (A, B))
        rows = [[number for name in row for number in numbers.get(name, ())] for row in mix.rows]
        repeated = [row for row in rows for _ in range(repeats)]
        if not triton:
            return lora_cpu.Mixed.of(pairs, repeated)
        from veneer.ops.grouped_triton import Mixed

        return Mixed(pairs, repeated) if any(rows) else None

    def _by_row(self, mix: Mix, repeats: int, x: Tensor, y: Tensor) -> Tensor:
        A, B = _padded([_pair(deltas, y) for deltas in self.members.values()])
        A, B = F.pad(A, (0, 0, 0, 0, 0, 1)), F.pad(B, (0, 0, 0, 0, 0, 1))  # the last adds nothing
        here = {name: place for place, name in enumerate(self.members)}
        local = torch.tensor([*(here.get(name, len(here)) for name in mix.able), len(here)], device=y.device)
        index = local[mix.index.to(y.device)].repeat_interleave(repeats, 0)
        flat, out = x.reshape(len(x), -1, x.shape[-1]), y.reshape(len(y), -1, y.shape[-1])
        for depth in range(index.shape[1]):
            mine = index[:, depth]
            out = out + torch.bmm(torch.bmm(flat, A[mine].mT), B[mine].mT)
        return out.view(y.shape)


class _Kept:
    """The groups of one module, and what they were made from."""

    def __init__(self, groups: list[Group] | None, training: bool) -> None:
        self.groups, self.training = groups, training
        self.tensors = [tensor for group in groups or () for tensor in group.tensors()]
        self.counted = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self.places, self.versions = list(map(Tensor.data_ptr, self.tensors)), list(map(_version, self.counted))

    def holds(self, training: bool) -> bool:
        """Whether nothing has changed since: where the tensors lie, and their numbers where there are copies of them.

        To look at the tensors of many adapters takes about as long as their products: they are in no cache.
        """
        if self.training != training or self.places != list(map(Tensor.data_ptr, self.tensors)):
            return False
        copied = any(group.copied for group in self.groups or ())
        return not copied or self.versions == list(map(_version, self.counted))


_version = attrgetter("_version")


@dataclass
class _Tiles:
    """Rows by adapter: `taken` in tiles of equal size, `filled` the entries that count, and the rows they belong to."""

    A: Tensor
    B: Tensor
    taken: Tensor
    filled: Tensor | None
    rows: Tensor

    @classmethod
    def of(cls, pairs: dict[str, tuple[Tensor, Tensor]], served: dict[str, list[int]], device: torch.device) -> _Tiles:
        """Tiles as large as an adapter has rows on average: that makes few padded rows, and few adapters come twice."""
        size = -(-sum(map(len, served.values())) // len(served))
        owners: list[tuple[Tensor, Tensor]] = []
        taken: list[int] = []
        filled: list[int] = []
        for name, rows in served.items():
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                owners.append(pairs[name])
                filled += range(len(taken), len(taken) + len(part))
                taken += part + part[:1] * (size - len(part))
        numbers = [taken, filled, [taken[entry] for entry in filled]]
        taken_, filled_, rows_ = (torch.tensor(each, device=device) for each in numbers)
        return cls(*_padded(owners), taken_, None if len(filled) == len(taken) else filled_, rows_)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y with what the tiles add to their rows."""
        tiles = x.index_select(0, self.taken).reshape(len(self.A), -1, x.shape[-1])
        change = torch.bmm(torch.bmm(tiles, self.A.mT), self.B.mT).view(len(self.taken), *y.shape[1:])
        if self.filled is not None:
            change = change.index_select(0, self.filled)
        return y.index_add(0, self.rows, change)


def _pair(deltas: Sequence[After], like: Tensor) -> tuple[Tensor, Tensor]:
    """A [rank, in] and s·B [out, rank] of all deltas of an adapter together, as `like` is stored."""
    pairs = [delta.pair() for delta in deltas]
    found = [pair for pair in pairs if pair is not None]
    A = torch.cat([A for A, _, _ in found]) if len(found) > 1 else found[0][0]
    B = torch.cat([B * scale for _, B, scale in found], dim=1)
    return A.to(like.dtype), B.to(like.dtype)


def _padded(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All A as [pairs, rank, in] and all B as [pairs, out, rank], with zeros up to the largest rank."""
    rank = max(len(A) for A, _ in pairs)
    A = torch.stack([A if len(A) == rank else F.pad(A, (0, 0, 0, rank - len(A))) for A, _ in pairs])
    B = torch.stack([B if B.shape[1] == rank else F.pad(B, (0, rank - B.shape[1])) for _, B in pairs])
    return A, B
