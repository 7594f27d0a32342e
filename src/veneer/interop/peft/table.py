"""Kinds of PEFT files that hold the same few tensors for each linear layer: a table of names, and the config's fields.

Modules trained whole lie beside them, under their own paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from veneer import places
from veneer.delta import Method, Place
from veneer.errors import CorruptFile, FileError, listed
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import (
    PREFIX,
    Entry,
    NotInPEFT,
    base_fields,
    fill,
    names,
    refuse_incomplete,
    target_modules,
)
from veneer.methods import FullFineTuning

_EVERY_CONFIG = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode"),
        *("peft_type", "target_modules", "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("fan_in_fan_out", "megatron_core"),
    }
)


@dataclass
class Table:
    """One such kind.

    `tensors` has PEFT's name, behind the module's path, for each tensor of our deltas. `write` gives the config's own
    fields for the claims of `METHODS`, of which there is one; `read` is its inverse. `known` names the fields that
    `read` looks at or that change nothing; `only` has the values that a field may have at all. Whatever else is set is
    refused. `conv1d` says whether PEFT has the kind on transformers' Conv1D.
    """

    METHODS: tuple[type[Method], ...]
    tensors: Mapping[str, str]
    write: Callable[[Sequence[Claim]], dict[str, Any]]
    read: Callable[[dict[str, Any]], Method]
    known: frozenset[str]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    conv1d: bool = True

    def to_tensors(self, claims: Sequence[Claim]) -> dict[str, Tensor]:
        """As `Kind` says."""
        return {key: tensor.detach() for key, tensor in self._tensors(claims).items()}

    def from_tensors(self, claims: Sequence[Claim], tensors: dict[str, Tensor]) -> None:
        """As `Kind` says."""
        for key, tensor in self._tensors(claims).items():
            fill(tensor, tensors[key])

    def _tensors(self, claims: Sequence[Claim]) -> dict[str, Tensor]:
        """Our own tensors under PEFT's keys."""
        found: dict[str, Tensor] = {}
        adapted = {claim.place.owner_path for claim in claims if isinstance(claim.method, self.METHODS)}
        if len(adapted) < len(self._own(claims)):
            raise NotInPEFT("PEFT holds one change of this kind a module")
        for claim in claims:
            own = claim.delta.state_dict(keep_vars=True)
            if isinstance(claim.method, self.METHODS):
                _refuse_other_layers(claim.place, self.conv1d)
                found |= {
                    f"{PREFIX}{claim.place.owner_path}.{theirs}": own[name] for name, theirs in self.tensors.items()
                }
                continue
            for place in (claim.place, *claim.place.tied):
                if place.owner_path in adapted:
                    raise NotInPEFT(f"PEFT does not hold {place.path} beside what it changes there")
                found[f"{PREFIX}{place.owner_path}.{place.parameter}"] = own["value"]
        return found

    def to_config(self, adapter: Adapter) -> dict[str, Any]:
        """As `Kind` says."""
        own = self._own(adapter.claims)
        return {
            **base_fields(adapter),
            "target_modules": target_modules(adapter.model, {claim.place.owner_path for claim in own}),
            **self.write(own),
        }

    def _own(self, claims: Sequence[Claim]) -> list[Claim]:
        return [claim for claim in claims if isinstance(claim.method, self.METHODS)]

    def from_config(self, model: nn.Module, config: dict[str, Any], keys: set[str], file: str) -> list[Entry]:
        """As `Kind` says."""
        title = self.METHODS[0].__name__
        foreign = [
            name for name, value in config.items() if value and name not in {*_EVERY_CONFIG, *self.known, *self.only}
        ]
        foreign += [
            f"{name}={config[name]!r}" for name, may in self.only.items() if config.get(name, may[0]) not in may
        ]
        if foreign:
            raise FileError(
                f"{file} uses {listed(sorted(foreign))}, which Veneer's {title} does not have; merge it with PEFT."
            )
        try:
            method = self.read(config)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFile(f"{file} is no config of a {title}: {error}.") from None
        ends = tuple(f".{name}" for name in self.tensors.values())
        modules = {key.removeprefix(PREFIX).removesuffix(end) for key in keys for end in ends if key.endswith(end)}
        refuse_incomplete(model, config, modules, file)
        whole = sorted(key.removeprefix(PREFIX) for key in keys if not key.endswith(ends))
        for name in names(config, "modules_to_save", file):
            if not any(re.fullmatch(rf"(.*\.)?{re.escape(name)}\..*", path) for path in whole):
                raise CorruptFile(f"{file} says that {name} was trained whole, but its tensors are missing.")
        order = {path: number for number, path in enumerate(places.weights(model))}
        paths = sorted(modules, key=lambda path: (order.get(path, len(order)), path))
        entries = [Entry(method, "target_modules", [(path, None) for path in paths])]
        if whole:
            entries.append(Entry(FullFineTuning(), "modules_to_save", [(path, None) for path in whole]))
        return entries


def _refuse_other_layers(place: Place, conv1d: bool) -> None:
    plain = place.parameter == "weight" and len(place.shape) == 2 and not isinstance(place.owner, nn.Embedding)
    plain = plain and (conv1d or isinstance(place.owner, nn.Linear))
    if not plain or place.spans is not None or place.functional:
        raise NotInPEFT(f"PEFT has this kind on whole linear layers only, and {place.path} is none")


def the_one(claims: Sequence[Claim]) -> Any:
    """The method of all the claims; NotInPEFT where there are several with different options."""
    methods = {repr(claim.method) for claim in claims}
    if len(methods) > 1:
        raise NotInPEFT("PEFT has one set of options for a whole adapter")
    return claims[0].method


def is_conv1d(claims: Sequence[Claim]) -> bool:
    """Whether the layers store their weights transposed."""
    return all(type(claim.place.owner).__name__ == "Conv1D" for claim in claims)
