"""A tiny input that a transformers model accepts, from its config and the signature of its forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

BATCH, LENGTH = 2, 7


def inputs(model: Any) -> dict[str, Tensor]:
    """Arguments for one forward: token ids, pixels or sound, and a decoder's ids."""
    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    if main == "pixel_values":
        return {"pixel_values": torch.zeros(BATCH, *_image(model.config))}
    if main == "input_ids":
        found = {"input_ids": _ids(LENGTH)}
    elif main == "input_features" and "max_source_positions" in vars(model.config):
        found = {main: torch.zeros(BATCH, model.config.num_mel_bins, 2 * model.config.max_source_positions)}
    else:
        raise NotImplementedError(f"inputs of the kind '{main}'")
    if "decoder_input_ids" in accepted:
        found["decoder_input_ids"] = _ids(LENGTH - 2)
    return found


def _ids(length: int) -> Tensor:
    return torch.arange(BATCH * length).reshape(BATCH, length) % 5 + 3


def _image(config: Any) -> tuple[int, int, int]:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.num_channels, height, width
