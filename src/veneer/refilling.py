"""Reading one file after another of the same layout into the same tensors, without parsing or making anything anew."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


class Refill:
    """Tensors by key, and a buffer in which a safetensors file that holds them lies beside them.

    `recipe` is what stands beside the file; `owners` are what the tensors share memory with, which must not move.
    """

    def __init__(self, recipe: bytes, targets: Mapping[str, Tensor], owners: Sequence[Tensor], file: Path) -> None:
        self.recipe = recipe
        self.owners = list(owners)
        self.places = [owner.data_ptr() for owner in owners]
        self.targets = list(targets.values())
        self.buffer = bytearray(file.read_bytes())
        self.start = 8 + int.from_bytes(self.buffer[:8], "little")
        self.header = bytes(self.buffer[: self.start])
        offsets = {key: entry.get("data_offsets") for key, entry in json.loads(self.header[8:]).items()}
        self.views = [
            torch.frombuffer(self.buffer, dtype=t.dtype, count=t.numel(), offset=self.start + offsets[key][0]).view(
                t.shape
            )
            for key, t in targets.items()
        ]
        dtypes = {target.dtype for target in self.targets}
        whole = len(dtypes) == 1 and (len(self.buffer) - self.start) == sum(view.nbytes for view in self.views)
        self.parts = [torch.frombuffer(self.buffer, dtype=dtypes.pop(), offset=self.start)] if whole else self.views

    @torch.no_grad()
    def take(self, recipe: bytes, file: Path) -> bool:
        """Copy a file in, where recipe and header are those known, all its numbers are finite, and nothing moved."""
        if recipe != self.recipe or self.places != [owner.data_ptr() for owner in self.owners]:
            return False
        with file.open("rb") as opened:
            if opened.readinto(self.buffer) != len(self.buffer) or opened.read(1):
                return False
        if not self.buffer.startswith(self.header) or not all(torch.isfinite(part.sum()) for part in self.parts):
            return False
        torch._foreach_copy_(self.targets, self.views)
        return True
