"""What training one method on one model costs, as choosing between methods weighs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer.delta import Method
from veneer.methods import FullFineTuning
from veneer.plan.plan import plan


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one training step on a 16-bit base, and what the adapter leaves behind.

    weights: of the base. trained: adapter, gradients and Adam's moments. activations: what else a step has alive at its
    peak, logits included. overhead: CUDA's context and the allocator's slack then. peak: all of it. sites: spots where
    a forward does more while the adapter is not merged. flops: of the products of a step. saved: bytes of the adapter's
    file.
    """

    trainable: int
    total: int
    weights: int
    trained: int
    activations: int
    overhead: int
    peak: int
    sites: int
    flops: float
    saved: int

    @property
    def share(self) -> float:
        """Trainable parameters over those of the base."""
        return self.trainable / self.total


def cost(
    model: str | Path | Any,
    method: Method,
    where: str | None = None,
    *,
    four_bits: bool = False,
    batch: int = 1,
    length: int = 512,
    checkpointing: bool = True,
) -> Cost:
    """The cost of training a model (as `plan` takes it) by a method, in bfloat16, with AdamW and transformers' loss.

    `four_bits` packs the linears (NF4 with double quantization, 4.127 bits a weight). Adapters are float32 with two
    float32 moments and are saved in float32; full fine-tuning trains the bfloat16 weights with bfloat16 moments.
    """
    made = plan(
        model,
        "full" if isinstance(method, FullFineTuning) else method,
        where,
        batch_size=batch,
        sequence_length=length,
        dtype=torch.bfloat16,
        quantization="nf4" if four_bits else None,
        checkpointing=checkpointing,
    )
    trained = made.counted["adapter"] + made.counted["gradients"] * 3  # and two moments
    weights, peak = round(made.counted["weights"]), round(made.peak.expected)
    overhead = round(made.highest["overhead"].expected)
    return Cost(
        trainable=made.trainable,
        total=made.total,
        weights=weights,
        trained=round(trained),
        activations=max(0, peak - weights - round(trained) - overhead),
        overhead=overhead,
        peak=peak,
        sites=round(made.counted.get("sites", 0)),
        flops=made.flops,
        saved=made.adapter_bytes,
    )
