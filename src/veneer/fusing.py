"""One adapter out of several: attention over them, the mean of their weights, or all of them in a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer.adapter import build, claim, install
from veneer.errors import AdapterError, Overlap
from veneer.handle import Adapter, Claim, handle, runs
from veneer.methods import AdapterFusion, FullFineTuning


def fuse(
    model: nn.Module,
    names: Sequence[Adapter | str],
    *,
    method: AdapterFusion | None = None,
    how: Literal["attention", "average", "stack"] = "attention",
    name: str = "fusion",
    also_train: Sequence[str] = (),
) -> Adapter:
    """Make one adapter out of two or more on the model, attach it under `name`, and make it the one that acts.

    - "attention": `method` (AdapterFusion) over frozen copies of bottleneck adapters. What the parts train whole beside
      them, such as heads, stays with them; `also_train` names modules that the fusion trains.
    - "average": the mean of their weights, for adapters of the same method at the same places (Chronopoulou et al.,
      "AdapterSoup", Findings of EACL 2023, arXiv:2302.07027). The mean of the factors of a product such as LoRA's is
      not the mean of the products.
    - "stack": all of them in one, acting one after the other in the order of `names`.

    The parts stay on the model as they are, and may be detached; the new adapter is whole by itself, and so is its
    folder. Raises AdapterError or MethodError, before the model is touched, where the parts do not fit together.
    """
    parts = [handle(model, each) for each in names]
    if len({part.name for part in parts}) < max(2, len(parts)):
        raise AdapterError(f"fuse takes two or more different adapters, not {[part.name for part in parts]}.")
    if how != "attention" and (method is not None or also_train):
        raise AdapterError(f"how='{how}' has no use for method or also_train. Leave them out.")
    if how == "attention":
        claims = _attending(method or AdapterFusion(), parts)
        claims += claim(model, {}, also_train=also_train)
    else:
        claims = _average(parts) if how == "average" else _stack(parts)
        also_train = list(dict.fromkeys(module for part in parts for module in part.also_train))
    return install(model, name, claims, also_train)


def _attending(method: AdapterFusion, parts: Sequence[Adapter]) -> list[Claim]:
    own = {part.name: [one for one in part.claims if not isinstance(one.method, FullFineTuning)] for part in parts}
    groups = {name: runs(claims) for name, claims in own.items()}
    for name, group in groups.items():
        if len(group) != 1 or _paths(group[0]) != _paths(own[parts[0].name]):
            raise AdapterError(
                f"AdapterFusion attends over adapters of one method each, at the same places, and '{name}' is not at "
                f"those of '{parts[0].name}' with one method. Attach them with one `where`."
            )
    method = dataclasses.replace(method, parts={name: claims[0].method for name, claims in own.items()})
    first = own[parts[0].name]
    claims = build(method, [one.place for one in first], first[0].where)
    for index, one in enumerate(claims):
        for name, trained in own.items():
            _copy(one.delta.get_submodule(f"parts.{name}"), trained[index].delta.get_submodule("bottleneck"))
    return claims


def _average(parts: Sequence[Adapter]) -> list[Claim]:
    first, *others = parts
    for other in others:
        if described(other) != described(first):
            raise AdapterError(
                f"Only adapters of the same method at the same places have a mean; '{other.name}' and '{first.name}' "
                'differ. Use how="stack", or attach them alike.'
            )
    return mean([(part, 1 / len(parts)) for part in parts])


def mean(shares: Sequence[tuple[Adapter, float]]) -> list[Claim]:
    """The claims of adapters that `described` gives alike, built anew, with the sum of share times tensor."""
    first = shares[0][0]
    claims = [one for run in runs(first.claims) for one in _again(run)]
    states = [(share, adapter.state_dict()) for adapter, share in shares]
    for key, tensor in Adapter("", first.model, claims).named_tensors():
        values = [state[key] for _, state in states]
        if tensor.is_floating_point():
            tensor.data = torch.stack([share * state[key] for share, state in states]).sum(0)
        elif all(torch.equal(values[0], each) for each in values):
            tensor.data = values[0].clone()
        else:
            raise AdapterError(f"{key} holds no numbers to take the mean of, and differs between the adapters.")
    return claims


def _stack(parts: Sequence[Adapter]) -> list[Claim]:
    claims: list[Claim] = []
    whole: set[Any] = set()
    for part in parts:
        for run in runs(part.claims):
            again = _again(run)
            for new, old in zip(again, run, strict=True):
                if isinstance(new.method, FullFineTuning) and new.place.key in whole:
                    raise Overlap(f"Two of the adapters train {new.place.path} whole; only one of them can be read.")
                whole.add(new.place.key)
                _copy(new.delta, old.delta)
            shared, trained = again[0].place.shared, run[0].place.shared
            if shared is not None and trained is not None:
                _copy(shared, trained)
            claims += again
    return claims


def _again(run: Sequence[Claim]) -> list[Claim]:
    """The claims of one method built anew, with a method of their own, so that they stay a group."""
    return build(dataclasses.replace(run[0].method), [one.place for one in run], run[0].where)


def _paths(claims: Sequence[Claim]) -> list[str]:
    return [one.place.path for one in claims]


def described(adapter: Adapter) -> list[tuple[Any, ...]]:
    """What two adapters must have in common for their weights to have a mean: methods and places, in order."""
    return [(one.method, one.place.path, one.place.spans) for one in adapter.claims]


def _copy(new: nn.Module, old: nn.Module) -> None:
    """Give a module the tensors of another, in their dtype."""
    tensors: dict[str, Tensor] = old.state_dict(keep_vars=True)
    for key, tensor in new.state_dict(keep_vars=True).items():
        tensor.data = tensors[key].detach().clone()
