"""Kinds of PEFT files that hold what an adapter has at each module as it is, under other names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from veneer import places
from veneer.delta import Method, Place, row_index
from veneer.errors import CorruptFile, FileError, listed
from veneer.handle import Adapter, Claim
from veneer.interop.peft.common import (
    PREFIX,
    Entry,
    NotInPEFT,
    base_fields,
    fill,
    refuse_incomplete,
    refuse_unsaved,
    target_modules,
    whole_path,
)
from veneer.methods import FullFineTuning

_FIELDS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode"),
    *("peft_type", "target_modules", "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "init_weights"),
}


class Plain(ABC):
    """A `Kind` by a table: `endings` says for a claim which tensor of its delta has which PEFT ending and shape."""

    METHODS: tuple[type[Method], ...]
    fields: ClassVar[frozenset[str]] = frozenset()
    """The config's options that `method` reads, or that only say where the adapter came from."""
    outside: ClassVar[float | None] = None
    """What PEFT's one tensor holds outside the rows of one role of a fused projection; None where there is no such."""

    @abstractmethod
    def endings(self, claim: Claim) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name in the delta -> PEFT's ending behind the module's path, and the tensor's shape there."""

    @abstractmethod
    def options(self, adapter: Adapter) -> dict[str, Any]:
        """The fields of the config that are this kind's own."""

    @abstractmethod
    def entries(self, model: nn.Module, config: dict[str, Any], modules: dict[str, set[str]], file: str) -> list[Entry]:
        """The methods at these modules, each with the endings that it has in the file."""

    known: ClassVar[tuple[str, ...]]
    """All endings that there are."""

    def to_tensors(self, claims: Sequence[Claim]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        taken: list[Place] = []
        for claim in self._own(claims):
            place = claim.place
            if any(place.path == other.path or place.overlaps(other) for other in taken if other.owner is place.owner):
                raise NotInPEFT(f"PEFT has one adapter of a kind at {place.path}")
            taken.append(place)
            for name, (ending, shape) in self.endings(claim).items():
                value = claim.delta.state_dict()[name].detach()
                for at in (place, *place.tied):
                    key = f"{PREFIX}{at.owner_path}.{ending}"
                    if place.spans is None:
                        tensors[key] = value.view(shape)
                        continue
                    if self.outside is None:
                        raise NotInPEFT(f"PEFT has no such adapter on a role of the fused {place.path}")
                    size = place.format.shape(place.owner, place.parameter)[0]
                    joined = tensors.setdefault(key, value.new_full((size, *shape[1:]), self.outside))
                    joined[row_index(place.spans, joined.device)] = value.view(shape)
        adapted = {place.owner_path for place in taken}
        for claim in claims:
            if isinstance(claim.method, FullFineTuning):
                (value,) = claim.delta.parameters()
                for at in (claim.place, *claim.place.tied):
                    tensors[_whole_key(at, adapted)] = value.detach()
        return tensors

    def from_tensors(self, claims: Sequence[Claim], tensors: dict[str, Tensor]) -> None:
        for claim in self._own(claims):
            place, own = claim.place, claim.delta.state_dict(keep_vars=True)
            for name, (ending, _) in self.endings(claim).items():
                tensor = tensors[f"{PREFIX}{place.owner_path}.{ending}"]
                if place.spans is not None:
                    tensor = tensor[row_index(place.spans, tensor.device)]
                fill(own[name], tensor.reshape(own[name].shape))
        for claim in claims:
            if isinstance(claim.method, FullFineTuning):
                (value,) = claim.delta.parameters()
                fill(value, tensors[_whole_key(claim.place, set())])

    def to_config(self, adapter: Adapter) -> dict[str, Any]:
        modules = {claim.place.owner_path for claim in self._own(adapter.claims)}
        return {
            **base_fields(adapter),
            "target_modules": target_modules(adapter.model, modules),
            **self.options(adapter),
        }

    def from_config(self, model: nn.Module, config: dict[str, Any], keys: set[str], file: str) -> list[Entry]:
        foreign = [name for name, value in config.items() if value and name not in _FIELDS | self.fields]
        if foreign:
            raise FileError(f"{file} uses {listed(sorted(foreign))}, which Veneer does not have; merge it with PEFT.")
        modules: dict[str, set[str]] = {}
        whole = set()
        for key in keys:
            ending = next((own for own in self.known if key.endswith(f".{own}")), None)
            if ending is None:
                whole.add(key)
            elif key.startswith(PREFIX):
                modules.setdefault(key.removeprefix(PREFIX).removesuffix(f".{ending}"), set()).add(ending)
        self.refuse_incomplete(model, config, set(modules), file)
        refuse_unsaved(config, keys, file)
        order = {path: i for i, (path, _) in enumerate(model.named_modules())}
        modules = dict(sorted(modules.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))
        try:
            entries = self.entries(model, config, modules, file)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, FileError):
                raise
            raise CorruptFile(f"{file} is no config of a {config.get('peft_type')}: {error}.") from None
        if whole:
            at: list[tuple[str, Any]] = [(whole_path(key), None) for key in sorted(whole)]
            entries.append(Entry(FullFineTuning(), "modules_to_save", at))
        return entries

    def refuse_incomplete(self, model: nn.Module, config: dict[str, Any], found: set[str], file: str) -> None:
        """Raise CorruptFile where the config names a module that the tensors lack."""
        refuse_incomplete(places.weights(model), config, found, file)

    def _own(self, claims: Sequence[Claim]) -> list[Claim]:
        return [claim for claim in claims if isinstance(claim.method, self.METHODS)]


def transposed(adapter: Adapter, kind: type[Method]) -> bool:
    """PEFT's `fan_in_fan_out`."""
    return all(type(c.place.owner).__name__ == "Conv1D" for c in adapter.claims if isinstance(c.method, kind))


def single(claims: Sequence[Claim], kind: type[Method]) -> Any:
    """The one method of this kind that all claims share; NotInPEFT where there are several."""
    found = {repr(claim.method): claim.method for claim in claims if isinstance(claim.method, kind)}
    if len(found) > 1:
        raise NotInPEFT(f"PEFT has one {kind.__name__} an adapter, and this one has {len(found)}")
    return next(iter(found.values()))


def _whole_key(place: Place, adapted: set[str]) -> str:
    if place.owner_path in adapted:
        raise NotInPEFT(f"PEFT does not save what it trains whole in {place.owner_path} and adapts as well")
    return f"{PREFIX}{place.owner_path}.{place.parameter}"
