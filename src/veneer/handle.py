"""The handle on an adapter, and what Veneer remembers about a model that carries adapters."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer import sharding
from veneer.counting import count_parameters
from veneer.delta import PASSING, Delta, Method, Place
from veneer.errors import AdapterError, MethodError, UnknownAdapter, closest, listed
from veneer.originals import Original
from veneer.refilling import Refill
from veneer.routes import Routes

STATE = "_veneer"


@dataclass(frozen=True)
class Claim:
    """One delta of an adapter: where it stands, and the method that built it."""

    where: str
    method: Method
    place: Place
    delta: Delta


@dataclass
class State:
    """What Veneer remembers about one model; it lies on the model, so that copies and pickles carry it."""

    routes: Routes = field(default_factory=Routes)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    trainable: dict[str, bool] = field(default_factory=dict)
    passing: list[RemovableHandle] = field(default_factory=list)
    """The hooks by which gradients pass quantized kernels that give none."""


class Adapter:
    """A handle on one adapter of one model: what `attach` and `load` return."""

    def __init__(self, name: str, model: nn.Module, claims: Sequence[Claim], also_train: Sequence[str] = ()) -> None:
        self.name = name
        self.model = model
        self.claims = tuple(claims)
        self.shared = list({id(s): s for claim in claims if (s := claim.place.shared) is not None}.values())
        self.also_train = tuple(also_train)
        self.originals: list[Original] = []
        self.attached = True
        self.refill: Refill | None = None
        """What takes in the files of other adapters of the same recipe, once one has been."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy has tensors of its own to refill."""
        return {**vars(self), "refill": None}

    def __repr__(self) -> str:
        methods = dict.fromkeys(type(claim.method).__name__ for claim in self.claims)
        return f"Adapter({self.name!r}: {', '.join(methods)} at {len(self.claims)} places)"

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of all that this adapter is made of and saves, trained or still.

        A key is a place's path, a running number and a name; what places share has `shared` for a path.
        """
        for key, delta in self._named_modules():
            for name, tensor in delta.state_dict(keep_vars=True).items():
                if not name.startswith(PASSING):
                    yield f"{key}.{name}", tensor

    def _named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield from ((f"shared.{number}", module) for number, module in enumerate(self.shared))
        seen: dict[str, int] = {}
        for claim in self.claims:
            number = seen.setdefault(claim.place.path, 0)
            seen[claim.place.path] += 1
            yield f"{claim.place.path}.{number}", claim.delta

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(key, parameter) of all that this adapter trains."""
        for key, module in self._named_modules():
            for name, parameter in module.named_parameters():
                if not isinstance(module, Delta) or module.trains(name):
                    yield f"{key}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that this adapter trains; give it to an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """What this adapter is made of, trained or still, by key; shares memory with it.

        Under FSDP2 the tensors are whole copies, and every process has to call this, and `load_state_dict`.
        """
        return {key: sharding.whole(tensor.detach()) for key, tensor in self.named_tensors()}

    def regularization(self) -> Tensor | None:
        """The sum of the terms that its methods add to the loss; None where there is none."""
        found = [method.penalty(deltas) for method, deltas in self._by_method()]
        terms = [term for term in found if term is not None]
        return torch.stack(terms).sum() if terms else None

    def after_step(self, step: int) -> None:
        """Tell its methods that optimizer step number `step`, from 1, is done: schedules act here."""
        for method, deltas in self._by_method():
            method.after_step(deltas, step)

    def _by_method(self) -> list[tuple[Method, list[Delta]]]:
        groups: dict[int, tuple[Method, list[Delta]]] = {}
        for claim in self.claims:
            groups.setdefault(id(claim.method), (claim.method, []))[1].append(claim.delta)
        return list(groups.values())

    def folded(self) -> Adapter:
        """This adapter in the form in which it is saved: what only training needs is folded away."""
        claims = [(claim, *claim.method.folded(claim.delta)) for claim in self.claims]
        if all(claim.delta is delta for claim, _, delta in claims):
            return self
        plain = [
            claim if claim.delta is delta else Claim(claim.where, method, replace(claim.place, shared=None), delta)
            for claim, method, delta in claims
        ]
        return Adapter(self.name, self.model, plain, self.also_train)

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors in; AdapterError, before anything is changed, where keys or shapes differ."""
        own = dict(self.named_tensors())
        problems = [f"{key} is missing" for key in own.keys() - tensors.keys()]
        problems += [f"{key} is left over" for key in tensors.keys() - own.keys()]
        problems += [
            f"{key} is {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}"
            for key in own.keys() & tensors.keys()
            if tensors[key].shape != own[key].shape
        ]
        if problems:
            raise AdapterError(f"The tensors do not fit adapter '{self.name}': {listed(sorted(problems))}.")
        for key, tensor in own.items():
            tensor.copy_(sharding.like(tensors[key], tensor))

    def parameter_groups(
        self, lr: float, lora_plus_ratio: float | None = None, head_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer: one at `lr`, and with `lora_plus_ratio` a second, at `lr` times it, for every B.

        `head_lr` is the rate of what `also_train` names, such as a new head.

        LoRA+ (Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024, arXiv:2402.12354) trains
        B faster than A; the paper's ratio is 16. Raises MethodError where the adapter has no B, or no `also_train`.
        """
        fast = {id(p) for claim in self.claims for n, p in claim.delta.named_parameters() if n in claim.delta.fast}
        if lora_plus_ratio is not None and not fast:
            raise MethodError(f"{self!r} has no B for lora_plus_ratio to act on. Leave lora_plus_ratio out.")
        if head_lr is not None and not self.also_train:
            raise MethodError(f"{self!r} has no also_train for head_lr to act on. Leave head_lr out.")
        pattern = rf"(.*\.)?({'|'.join(map(re.escape, self.also_train))})\..*"
        head = [one.delta for one in self.claims if self.also_train and re.fullmatch(pattern, one.place.path)]
        own = {id(p) for delta in head for p in delta.parameters()}
        faster = None if lora_plus_ratio is None else lr * lora_plus_ratio
        groups: dict[float, list[nn.Parameter]] = {rate: [] for rate in (lr, faster, head_lr) if rate is not None}
        for parameter in self.parameters():
            if head_lr is not None and id(parameter) in own:
                groups[head_lr].append(parameter)
            else:
                groups[lr if faster is None or id(parameter) not in fast else faster].append(parameter)
        return [{"params": found, "lr": rate} for rate, found in groups.items() if found]

    def summary(self) -> str:
        """A few lines for people: methods and places, what is trained, what is frozen, what acts now."""
        state = state_of(self.model)
        lines = [f"Adapter '{self.name}' on {type(self.model).__name__}"]
        groups: dict[tuple[str, str], list[Claim]] = {}
        for claim in self.claims:
            groups.setdefault((str(claim.method), claim.where), []).append(claim)
        for (method, where), claims in groups.items():
            mine = {id(c.place.shared): c.place.shared for c in claims if c.place.shared is not None}
            count = sum(p.numel() for c in claims for n, p in c.delta.named_parameters() if c.delta.trains(n))
            count += sum(p.numel() for shared in mine.values() for p in shared.parameters() if p.requires_grad)
            lines.append(f"  {method} at {len(claims)} places (where='{where}'): {count:,} parameters")
        frozen = sum(not p.requires_grad for p in self.model.parameters())
        lines.append(f"  {count_parameters(self.model)}; {frozen} other tensors are frozen until detach")
        if self.name in state.routes.merged:
            lines.append("  merged into the base's weights")
        dropped = sum(one.place.path in state.routes.dropped for one in self.claims)
        if dropped:
            lines.append(f"  nothing acts at {dropped} of its places (drop_layers)")
        lines.append(f"  active now: {', '.join(state.routes.active) or 'the base alone'}")
        return "\n".join(lines)


def runs(claims: Sequence[Claim]) -> list[list[Claim]]:
    """Claims in the groups they were built in: neighbours with one `where`, one method, and one thing they share."""
    together = itertools.groupby(claims, key=lambda one: (one.where, id(one.method), id(one.place.shared)))
    return [list(run) for _, run in together]


def state_of(model: nn.Module) -> State:
    """The model's state; a new one where nothing is attached yet."""
    state: State = vars(model).get(STATE) or State()
    return state


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by name, in the order of attaching."""
    return dict(state_of(model).adapters)


def handle(model: nn.Module, adapter: Adapter | str) -> Adapter:
    """The adapter of that name or handle; UnknownAdapter where it is not on the model."""
    name = adapter if isinstance(adapter, str) else adapter.name
    known = state_of(model).adapters
    if name not in known or (isinstance(adapter, Adapter) and known[name] is not adapter):
        there = f" It has: {', '.join(known)}." if known else " It has none."
        raise UnknownAdapter(f"{type(model).__name__} has no adapter '{name}'.{closest(name, known)}{there}")
    return known[name]


def in_order(state: State, names: Sequence[str]) -> tuple[str, ...]:
    """Names in the order of attaching, which is the order of stacking."""
    return tuple(name for name in state.routes.order if name in names)
