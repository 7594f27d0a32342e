"""LoRA-FA: LoRA whose A stays as it was drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from veneer.delta import Delta
from veneer.lowrank import Beside, Inside
from veneer.methods.lora import LoRA


class _FrozenBeside(Beside):
    still = frozenset({"A"})


class _FrozenInside(Inside):
    still = frozenset({"A"})


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA with a frozen A: only B is trained, so a layer's whole input need not be kept for the backward pass.

    Formula:
        W' = W + s·B·A, s = alpha / rank, A random and frozen.

    Shapes:
        A [rank, in], B [out, rank], as LoRA's.

    Defaults:
        As LoRA's, of which this is a kind: rank, alpha, dropout, use_rslora, init, bias and the patterns.

    Cost:
        rank · out trained parameters a layer; saves `rank` numbers a token for backward in place of `in`.

    Merging:
        W' is stored, rounded once to the dtype of the weight.

    Errors:
        As LoRA's.

    Paper:
        Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023,
        arXiv:2308.03303.

    Example:
        veneer.attach(model, veneer.LoRAFA(rank=8))
    """

    deltas: ClassVar[tuple[type[Delta], type[Delta]]] = (_FrozenBeside, _FrozenInside)
