"""What some methods add to a training, for any Trainer: a term in the loss, and a schedule after each step."""

from __future__ import annotations

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer import Adapter


class AdapterCallback(TrainerCallback):
    """Gives an adapter's methods their part in a training: `Trainer(model, ..., callbacks=[AdapterCallback(adapter)])`.

    Only AdaLoRA (a budget that falls from step to step, and orthogonality) and AdapterFusion (its V stays near the
    identity) have one; others need no callback, and none is harmed by it. The gradient of `adapter.regularization()` is
    in place before that of a step's batches is added, so clipping sees their sum; the loss that is logged is that of
    the batches alone.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Start the step's gradient with that of the term."""
        term = self.adapter.regularization()
        if term is None or not term.requires_grad:
            return
        if isinstance(optimizer, AcceleratedOptimizer) and optimizer.scaler is not None:
            term = optimizer.scaler.scale(term)
        term.backward()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the methods of the step, while its gradients are still there."""
        self.adapter.after_step(state.global_step + 1)
