"""checkpoint_activations: transformers' activation checkpointing, with no backward below the lowest adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.errors import PlaceError
from veneer.seams.transformers import is_pretrained


def checkpoint_activations(model: nn.Module, *, every_n_layers: int = 1) -> nn.Module:
    """Keep only each block's input for backward, and compute the block again there; returns the model.

    This is transformers' `activation_checkpointing_enable`, without the hook that it puts on the input embeddings to
    make their output ask for a gradient. Recomputing without re-entry, the default, does not need it, and with it all
    blocks are recomputed and back-propagated through, down to the embeddings, also those below the lowest adapter; and
    `torch.compile` breaks there. With the Trainer, call this and leave `activation_checkpointing` of its arguments off.
    It acts in training mode; `model.activation_checkpointing_disable()` ends it.

    `every_n_layers` (default 1) leaves out the blocks in between. Raises PlaceError for a model that is not one of
    transformers', or whose blocks cannot be recomputed.
    """
    pretrained: Any = model
    if not is_pretrained(model) or not pretrained.supports_gradient_checkpointing:
        raise PlaceError(
            f"transformers cannot recompute the blocks of a {type(model).__name__}. Call "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False) in its forward."
        )
    pretrained.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every_n_layers)
    pretrained.disable_input_require_grads()
    return model
