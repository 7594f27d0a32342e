"""How deep a transformers config is, and the same model with fewer blocks of each kind."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Depth:
    """How deep a model is, and the depths at which it is built: `few` and `more`, which differ by `period` blocks.

    names: the options of the config that say so. kinds: lists with an entry a block.
    """

    names: tuple[str, ...]
    layers: int
    few: int
    period: int
    kinds: tuple[str, ...]

    @property
    def more(self) -> int:
        """The greater of the two."""
        return self.few + self.period

    @property
    def steps(self) -> float:
        """How many times the difference of the two makes a model of full depth out of the smaller one."""
        return (self.layers - self.few) / self.period


def depths(config: Any) -> list[Depth]:
    """The stacks of blocks of a config, those of one depth together; a pattern of kinds of blocks stays whole."""
    text = config.get_text_config(decoder=False)
    stored = text.to_dict()
    first = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    names = list(dict.fromkeys((first, "encoder_layers", "decoder_layers", "num_decoder_layers")))
    found: dict[int, list[str]] = {}
    for name in names:
        if isinstance(stored.get(name), int):
            found.setdefault(stored[name], []).append(name)
    made = []
    for layers, same in found.items():
        kinds = tuple(name for name, value in stored.items() if isinstance(value, list) and len(value) == layers > 0)
        period = max([_period(stored[name]) for name in kinds], default=1)
        ahead = stored.get("first_k_dense_replace") or 0
        few = max(2, period + layers % period) + ahead
        if few + period >= layers:
            few, period = layers, 1
        made.append(Depth(tuple(same), layers, few, period, kinds))
    return made


def _period(kinds: list[Any]) -> int:
    return next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))


def shallow(config: Any, chosen: Mapping[Depth, int]) -> Any:
    """The config with so many blocks."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=False)
    for depth, layers in chosen.items():
        for name in depth.kinds:
            setattr(text, name, getattr(text, name)[:layers])
        for name in depth.names:
            setattr(text, name, layers)
    return config
