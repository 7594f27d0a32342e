"""Small inputs that a transformers model may accept, told by its config and the signature of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

BATCH, LENGTH, FRAMES, SAMPLES = 2, 7, 64, 4000


def candidates(model: Any) -> Iterator[dict[str, Tensor]]:
    """Arguments for one forward, the likeliest first: ids, pixels, sound, a time series or embeddings."""
    facts = _Facts(model.config)
    main = model.main_input_name
    kinds = [kind for kind in _KINDS if kind[0] == main]
    kinds += [kind for kind in _KINDS if kind[0] != main and accepts(model, kind[0])]
    tried = []
    for name, build in kinds:
        try:
            made = build(facts)
        except (AttributeError, TypeError):  # the config lacks a size that this kind of input has
            continue
        found = made if isinstance(made, dict) else {name: made}
        found = {key: tensor for key, tensor in found.items() if accepts(model, key)}
        shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
        if not found or shapes in tried:
            continue
        tried.append(shapes)
        if accepts(model, "decoder_input_ids") and "decoder_input_ids" not in found:
            found["decoder_input_ids"] = facts.ids(LENGTH - 2)
        if accepts(model, "input_features_mask") and name == "input_features":
            found["input_features_mask"] = torch.ones(BATCH, FRAMES, dtype=torch.long)
        if accepts(model, "bbox"):
            found["bbox"] = facts.boxes()
        yield found


def inputs(model: Any) -> dict[str, Tensor]:
    """The likeliest arguments for one forward."""
    return next(candidates(model))


def accepts(model: Any, name: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    return name in inspect.signature(model.forward).parameters


class _Facts:
    """What a config says of sizes; names are tried in turn."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.text = config.get_text_config()
        self.random = torch.Generator().manual_seed(0)

    def first(self, *names: str, default: Any = None, part: str = "") -> Any:
        """The first of these attributes that is set, of one part of the config or of the whole."""
        for config in (self._read(self.config, part), self.config) if part else (self.config,):
            for name in names:
                value = self._read(config, name)
                if value is not None:
                    return value
        return default

    @staticmethod
    def _read(config: Any, name: str) -> Any:
        try:
            return getattr(config, name, None)
        except Exception:  # some configs answer a question about the whole with an error of their own
            return None

    def ids(self, length: int = LENGTH) -> Tensor:
        """Token ids that are no special tokens."""
        special = {
            number
            for config in (self.config, self.text)
            for name, value in vars(config).items()
            if name.endswith(("token_id", "token_index"))
            for number in (value if isinstance(value, list) else [value])
        }
        size = self._read(self.text, "vocab_size") or self.first("vocab_size", default=32)
        known = [i for i in range(3, min(size, 90) if isinstance(size, int) else 32) if i not in special] or [0]
        return torch.tensor(known)[torch.randint(len(known), (BATCH, length), generator=self.random)]

    def noise(self, *shape: int) -> Tensor:
        """Random numbers; zeros would hide that something depends on them."""
        return torch.randn(BATCH, *shape, generator=self.random)

    def image(self, *frames: int, size: Any = None) -> Tensor:
        size = size or self.first("image_size", "input_size", "img_size", default=FRAMES, part="vision_config")
        height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
        channels = self.first("num_channels", "in_channels", "in_chans", default=3, part="vision_config")
        whole = isinstance(height, int) and isinstance(width, int)
        return self.noise(*frames, channels, *((height, width) if whole else (FRAMES, FRAMES)))

    def patches(self) -> Tensor:
        """An image of 4 by 4 patches, each a row: [16, what a patch holds]."""
        channels = self.first("in_channels", "num_channels", "in_chans", default=3, part="vision_config")
        side, deep = (
            self.first("patch_size", default=14, part="vision_config"),
            self.first("temporal_patch_size", default=1, part="vision_config"),
        )
        return torch.randn(16, channels * deep * side * side, generator=self.random)

    def grids(self) -> dict[str, Tensor]:
        """Two images as one row of patches, and how each is laid out: frames, rows and columns."""
        patches = torch.cat([self.patches(), self.patches()])
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        return {"hidden_states": patches, "pixel_values": patches, "grid_thw": grid, "image_grid_thw": grid}

    def shapes(self) -> dict[str, Tensor]:
        """Two images as rows of patches, and how each is laid out: rows and columns."""
        return {
            "pixel_values": torch.stack([self.patches(), self.patches()]),
            "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
        }

    def frames(self) -> int:
        count: int = self.first("frames_per_clip", "num_frames", default=4)
        return count

    def bands(self) -> int:
        names = ("feature_projection_input_dim", "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim")
        own = self.first(*names)
        part = "audio_config" if self.first("audio_config") is not None else "encoder_config"
        count: int = own or self.first("num_mel_bins", default=80, part=part)
        return count

    def positions(self) -> int:
        count: int = self.first("max_source_positions", default=FRAMES // 2, part="audio_config")
        return count

    def width(self) -> int:
        count: int = self.first("hidden_size", "d_model", default=FRAMES)
        return count

    def boxes(self) -> Tensor:
        return torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)

    def series(self) -> dict[str, Tensor]:
        past = self.config.context_length + max(self.config.lags_sequence)
        ahead, features = self.config.prediction_length, self.first("num_time_features", default=0)
        return {
            "past_values": self.noise(past),
            "past_time_features": self.noise(past, features),
            "past_observed_mask": torch.ones(BATCH, past),
            "future_values": self.noise(ahead),
            "future_time_features": self.noise(ahead, features),
        }


def _masked(name: str, tensor: Tensor) -> dict[str, Tensor]:
    length = tensor.shape[1]
    return {name: tensor, "attention_mask": torch.ones(BATCH, length, dtype=torch.long)}


_KINDS: list[tuple[str, Callable[[_Facts], Tensor | dict[str, Tensor]]]] = [
    ("input_ids", lambda facts: facts.ids()),
    ("pixel_values", lambda facts: facts.image()),
    ("pixel_values", lambda facts: facts.image(facts.frames())),
    ("pixel_values", lambda facts: facts.image(size=224)),
    (
        "pixel_values_videos",
        lambda facts: facts.image(facts.frames(), size=facts.first("crop_size")),
    ),
    (
        "input_values",
        lambda facts: facts.noise(facts.first("max_length", default=FRAMES), facts.first("num_mel_bins", default=80)),
    ),
    ("input_values", lambda facts: facts.noise(SAMPLES)),
    ("input_values", lambda facts: facts.noise(1, SAMPLES)),
    ("input_features", lambda facts: facts.noise(facts.bands(), 2 * facts.positions())),
    ("input_features", lambda facts: facts.noise(FRAMES, facts.bands())),
    ("input_features", lambda facts: _masked("input_features", facts.noise(FRAMES, facts.bands()))),
    (
        "past_values",
        lambda facts: facts.noise(
            facts.first("context_length", default=32), facts.first("num_input_channels", default=1)
        ),
    ),
    ("past_values", _Facts.series),
    ("grid_thw", _Facts.grids),
    ("image_grid_thw", _Facts.grids),
    ("spatial_shapes", _Facts.shapes),
    ("input_ids", lambda facts: _masked("input_ids", facts.ids())),
    ("input_ids", lambda facts: {**_masked("input_ids", facts.ids()), "pixel_values": facts.image()}),
    (
        "input_features",
        lambda facts: {**_masked("input_ids", facts.ids()), "input_features": facts.noise(facts.bands(), FRAMES)},
    ),
    ("inputs_embeds", lambda facts: facts.noise(LENGTH, facts.width())),
    ("hidden_states", lambda facts: facts.noise(LENGTH, facts.width())),
]
