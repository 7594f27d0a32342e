"""accelerate's `save_state` for loops of one's own: adapters alone, as a Trainer's checkpoints are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from accelerate import Accelerator


def save_adapters_only(accelerator: Accelerator) -> None:
    """From now on `save_state` leaves out what adapters leave as it is, and `load_state` does not ask for it.

    Call it once, after `prepare`. Both need transformers models; any other is saved whole.
    """
    accelerator.register_save_state_pre_hook(_leave_out)
    accelerator.register_load_state_pre_hook(_load)


def _leave_out(models: list[Any], weights: list[dict[str, Any]], folder: str) -> None:
    for model, state in zip(models, weights, strict=True):
        for key in state.keys() & set(vars(model).get("_keys_to_ignore_on_save") or ()):
            del state[key]


def _load(models: list[Any], folder: str) -> None:
    for number, model in enumerate(models):
        name = f"model_{number}.safetensors" if number else "model.safetensors"
        model.load_state_dict(safetensors.torch.load_file(Path(folder) / name), strict=False)
    models.clear()  # accelerate loads what is left, strictly
