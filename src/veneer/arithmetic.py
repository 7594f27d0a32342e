"""New adapters computed from trained ones: weighted sums of what they change, and any of them as a plain LoRA."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from veneer import places
from veneer.adapter import build, install
from veneer.changes import Change, Thin, change, dare, dense, scaled, ties, total, truncated, whole
from veneer.delta import Delta, Place
from veneer.errors import AdapterError, MethodError, NotMergeable, listed
from veneer.fusing import described, mean
from veneer.handle import Adapter, Claim, handle, state_of
from veneer.methods import FullFineTuning, LoRA

How = Literal["sum", "concatenate", "svd", "ties", "dare", "average"]
Part = tuple[Adapter, float]
Bias = Literal["none", "lora_only", "all"]


@dataclass(frozen=True)
class Computed:
    """An adapter computed from others.

    `adapter` is attached. `errors` has, for each place that was brought to a lower rank, the share of the change that
    got lost: the Frobenius norm of what is missing over that of the whole.
    """

    adapter: Adapter
    errors: Mapping[str, float]

    def summary(self) -> str:
        """Lines for people: how exact it is, and the places that lost most."""
        worst = sorted(self.errors, key=lambda path: -self.errors[path])[:5]
        if not worst or not self.errors[worst[0]]:
            return f"Adapter '{self.adapter.name}' is exact."
        mean = sum(self.errors.values()) / len(self.errors)
        lines = [f"Adapter '{self.adapter.name}' leaves out {mean:.2%} of the change in the mean of {len(self.errors)}"]
        lines[0] += " places (relative Frobenius norm). Most at:"
        return "\n".join([*lines, *(f"  {self.errors[path]:.2%}  {path}" for path in worst)])


@dataclass
class _Spot:
    """One weight, and what each part that changes it has there."""

    place: Place
    where: str
    parts: list[tuple[float, list[Claim]]] = field(default_factory=list)


def combine(
    model: nn.Module,
    parts: Mapping[str, float] | Sequence[Adapter | str],
    weights: Sequence[float] | None = None,
    *,
    how: How = "sum",
    name: str = "combined",
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> Computed:
    """Make one adapter out of trained ones, attach it under `name`, and make it the one that acts; the parts stay.

    `parts` maps adapters' names to weights w, `{"a": 0.7, "b": 0.3}`; or they are a list, with `weights`.

    - "sum": the weighted sum of what they change. LoRAs are put side by side, for Σ w·s·B·A is a product of rank Σ r;
      adding up the A and the B by themselves, as PEFT's "linear" does, is no sum. What is trained whole (heads, biases)
      adds up by its distance from the base. Exact.
    - "concatenate": the same for adapters that have LoRAs, by the name PEFT gives it.
    - "svd": the best approximation of the sum as LoRAs of `rank`; also for other methods that can be merged.
    - "ties" (Yadav et al., "TIES-Merging", NeurIPS 2023, arXiv:2306.01708): of each change keep the `density` of the
      entries that are largest, elect a sign for each entry, take the mean of those that have it; then as "svd". A
      common weight is the paper's λ; different ones count in the election too. The paper trims over all places at
      once, here each place is trimmed alone, so that one is held at a time.
    - "dare" (Yu et al., "Language Models are Super Mario", ICML 2024, arXiv:2311.03099): of each change keep a random
      `density`, by `seed` (0), scaled by 1 / density; add up; then as "svd".
    - "average": the mean of the weights themselves, for methods that act on activations: the same method at the same
      places (AdapterSoup, Chronopoulou et al., EACL 2023, arXiv:2302.07027). The means are weighted by w / Σ w.

    Where one part has no change at a place, it counts as zero there.

    Raises AdapterError or MethodError, before the model is touched, where parts do not fit together.
    """
    chosen = _chosen(model, parts, weights)
    _check_options(how, rank, density, seed)
    if how == "average":
        claims, errors = _average(chosen), dict[str, float]()
    else:
        mix = _mixer(how, density, seed)
        spots, valued = _sorted_out(chosen)
        if how == "concatenate" and not spots:
            raise MethodError("There are no LoRAs to concatenate; what is trained whole adds up by how='sum'.")
        claims, errors = _low_rank(spots, how, rank, mix, _bias(chosen))
        claims += _valued(valued, mix)
    also_train = list(dict.fromkeys(module for adapter, _ in chosen for module in adapter.also_train))
    return Computed(install(model, name, claims, also_train), errors)


def to_lora(model: nn.Module, adapter: Adapter | str, rank: int, *, name: str = "lora") -> Computed:
    """Attach the best approximation by LoRAs of `rank` of an adapter that can be merged; it is the one that acts.

    At each matrix it is the truncated singular value decomposition of the merged weight minus the base's; LoRA of at
    most this rank stays exact. What was trained whole and is no matrix (biases, norms) stays beside it. Programs that
    know nothing but LoRA can then serve DoRA, VeRA, OFT and the like; `errors` says what that costs at each place.

    Raises NotMergeable where a method acts on activations, and AdapterError where an adapter is merged.
    """
    adapter = handle(model, adapter)
    _refuse_merged(model)
    _check_rank(rank)
    spots, kept = _matrices(model, adapter)
    owners = {spot.place.owner_path for spot in spots}
    apart = [place.owner_path for place, _ in kept if place.owner_path not in owners]
    bias: Bias = "lora_only" if len(apart) < len(kept) else "none"
    claims, errors = _low_rank(spots, "svd", rank, _mixer("svd", None, None), bias)
    method = FullFineTuning()
    for place, group in kept:
        (new,) = build(method, [place], group[0].where)
        _set(new.delta, "value", whole(place, group))
        claims.append(new)
    return Computed(install(model, name, claims, list(dict.fromkeys(apart))), errors)


def _matrices(model: nn.Module, adapter: Adapter) -> tuple[list[_Spot], list[tuple[Place, list[Claim]]]]:
    """What a mergeable adapter has at each matrix of the model, and at each parameter that is none."""
    inventory = {place.key: place for place in places.weights(model).values()}
    parameters = places.parameters(model)
    spots: dict[str, _Spot] = {}
    kept: dict[str, tuple[Place, list[Claim]]] = {}
    for one in adapter.claims:
        if not one.delta.mergeable:
            raise NotMergeable(
                f"{type(one.method).__name__} at {one.place.path} acts on activations; no LoRA comes near it. Keep it "
                "attached as it is."
            )
        here = [one.place, *one.place.tied]
        matrices = [matrix for place in here if (matrix := _mapped(inventory.get(place.key)))]
        if not matrices:
            kept.setdefault(one.place.path, (one.place, []))[1].append(one)
        if one.place.bias and type(one.delta).merge_bias is not Delta.merge_bias:
            kept.setdefault(one.place.bias, (parameters[one.place.bias], []))[1].append(one)
        for matrix in matrices:
            rows_only = all(other.place.spans for other in adapter.claims if other.place.key == one.place.key)
            place = dataclasses.replace(one.place, map=matrix.map) if rows_only else matrix
            spots.setdefault(place.path, _Spot(place, one.where, [(1.0, [])])).parts[0][1].append(one)
    return list(spots.values()), list(kept.values())


def _chosen(
    model: nn.Module, parts: Mapping[str, float] | Sequence[Adapter | str], weights: Sequence[float] | None
) -> list[Part]:
    if isinstance(parts, Mapping) == (weights is not None):
        raise AdapterError("Give each part its weight: a mapping such as {'a': 0.7, 'b': 0.3}, or a list and weights.")
    factors = list(parts.values()) if isinstance(parts, Mapping) else list(weights or ())
    if len(parts) != len(factors) or not parts:
        raise AdapterError(f"combine got {len(parts)} adapters and {len(factors)} weights. Give each its weight.")
    chosen = [(handle(model, part), float(weight)) for part, weight in zip(parts, factors, strict=True)]
    if len({adapter.name for adapter, _ in chosen}) < len(chosen):
        raise AdapterError(f"combine got an adapter twice: {listed(adapter.name for adapter, _ in chosen)}.")
    for adapter, weight in chosen:
        if not math.isfinite(weight) or not weight:
            raise AdapterError(f"The weight of '{adapter.name}' is {weight}; leave the adapter out, or weigh it.")
    _refuse_merged(model)
    return chosen


def _refuse_merged(model: nn.Module) -> None:
    merged = state_of(model).routes.merged
    if merged:
        raise AdapterError(
            f"Adapter '{merged[-1]}' is merged, so what others change in the base cannot be told. Call veneer.unmerge "
            "first."
        )


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise MethodError(f"rank={rank} is less than 1.")


def _check_options(how: str, rank: int | None, density: float | None, seed: int | None) -> None:
    if how not in get_args(How):
        raise MethodError(f"how='{how}' is none of {', '.join(get_args(How))}.")
    uses = {"svd": ("rank",), "ties": ("rank", "density"), "dare": ("rank", "density", "seed")}.get(how, ())
    for option, value in {"rank": rank, "density": density, "seed": seed}.items():
        if value is not None and option not in uses:
            raise MethodError(f"how='{how}' has no use for {option}={value}. Leave it out.")
    if rank is not None:
        _check_rank(rank)
    if "density" in uses and (density is None or not 0 < density <= 1):
        raise MethodError(f"how='{how}' keeps a share of the entries: density={density} must be over 0 and at most 1.")


Mix = Callable[[Sequence[tuple[float, Change]]], Change]


def _mixer(how: str, density: float | None, seed: int | None) -> Mix:
    """What makes one change of the weighted changes at one place."""
    if density is None:
        return lambda changes: total([scaled(one, weight) for weight, one in changes])
    share = density
    if how == "ties":
        return lambda changes: ties([(weight, dense(one)) for weight, one in changes], share)
    generator = torch.Generator().manual_seed(seed or 0)
    return lambda changes: dare([(weight, dense(one)) for weight, one in changes], share, generator)


def _sorted_out(chosen: Sequence[Part]) -> tuple[list[_Spot], list[_Spot]]:
    """The places where changes are matrices, and those where parameters add up one by one."""
    spots: dict[str, _Spot] = {}
    valued: dict[str, _Spot] = {}
    keys: dict[tuple[int, str], tuple[bool, str]] = {}
    for adapter, weight in chosen:
        mine: dict[str, list[Claim]] = {}
        for one in adapter.claims:
            if not (one.delta.linear or (one.delta.mergeable and one.method.unit != "parameter")):
                raise AdapterError(
                    f"{type(one.method).__name__} at {one.place.path} of '{adapter.name}' changes no weight that could "
                    'add up. Only how="average" combines such methods.'
                )
            kind, other = keys.setdefault(one.place.key, (one.delta.linear, adapter.name))
            if kind != one.delta.linear:
                raise AdapterError(
                    f"'{other}' and '{adapter.name}' change {one.place.path} by methods of different kinds, one by low "
                    "ranks and one entry by entry. Bring both to LoRA by veneer.to_lora first."
                )
            mine.setdefault(one.place.path, []).append(one)
        for path, claims in mine.items():
            first = claims[0]
            place = first.place if first.delta.linear else _mapped(first.place)
            assert place is not None
            spot = (valued if first.delta.linear else spots).setdefault(path, _Spot(place, first.where))
            spot.parts.append((weight, claims))
    return list(spots.values()), list(valued.values())


def _mapped(place: Place | None) -> Place | None:
    """The place with its map; None where it is no linear map."""
    try:
        return place and dataclasses.replace(place, map=place.format.map(place.reader))
    except MethodError:
        return None


def _bias(chosen: Sequence[Part]) -> Bias:
    options = {one.method.bias for part, _ in chosen for one in part.claims if isinstance(one.method, LoRA)}
    return max(options, key=lambda bias: get_args(Bias).index(bias), default="none")


def _low_rank(
    spots: Iterable[_Spot], how: str, rank: int | None, mix: Mix, bias: Bias
) -> tuple[list[Claim], dict[str, float]]:
    """A LoRA of scale 1 at each spot, and what it leaves out."""
    claims: list[Claim] = []
    errors: dict[str, float] = {}
    methods: dict[int, LoRA] = {}
    for spot in spots:
        path = spot.place.path
        mixed = mix([(weight, change(spot.place, group)) for weight, group in spot.parts])
        if how not in ("sum", "concatenate"):
            if rank is None:
                raise MethodError(f"how='{how}' gives a dense change at {path}. Give the rank it is brought to.")
            thin, errors[path] = truncated(mixed, rank)
        elif isinstance(mixed, Thin):
            thin = mixed
        else:
            kinds = {type(one.method).__name__ for _, group in spot.parts for one in group} - {"LoRA"}
            raise AdapterError(
                f"The sum at {path} is exact only for LoRA, and there is {listed(sorted(kinds))}. Use how='svd' with a "
                "rank."
            )
        method = methods.setdefault(thin.rank, LoRA(rank=thin.rank, alpha=float(thin.rank), bias=bias))
        (new,) = build(method, [spot.place], spot.where)
        _set(new.delta, "A", thin.A)
        _set(new.delta, "B", thin.B)
        claims.append(new)
    return claims, errors


def _valued(spots: Sequence[_Spot], mix: Mix) -> list[Claim]:
    """Each parameter at its start plus the mixed distances from there."""
    claims = []
    for spot in spots:
        first = spot.parts[0][1][0]
        for _, group in spot.parts:
            if len(group) > 1 or group[0].method != first.method:
                raise AdapterError(f"The parts have different methods at {spot.place.path}; only equal ones add up.")
        (new,) = build(first.method, [spot.place], spot.where)
        trained = [(weight, dict(group[0].delta.named_parameters())) for weight, group in spot.parts]
        for name, start in new.delta.named_parameters():
            mixed = mix([(weight, (values[name] - start).detach()) for weight, values in trained])
            start.data = start.data + dense(mixed)
        claims.append(new)
    return claims


def _average(chosen: Sequence[Part]) -> list[Claim]:
    """The claims of the first part, built anew, with the weighted mean of all parts' tensors."""
    first, *others = [adapter for adapter, _ in chosen]
    for one in first.claims:
        if one.delta.mergeable and not one.delta.linear:
            raise AdapterError(
                f"{type(one.method).__name__} multiplies what it trains, and the mean of factors is not the mean of "
                "products. Use how='sum' with weights that sum to 1, or how='svd'."
            )
    for other in others:
        if described(other) != described(first):
            raise AdapterError(
                f"'{first.name}' and '{other.name}' have different methods or places; only the same at the same places "
                "have a mean."
            )
    size = sum(weight for _, weight in chosen)
    if not size:
        raise AdapterError("The weights sum to zero; a mean divides by their sum.")
    return mean([(adapter, weight / size) for adapter, weight in chosen])


def _set(delta: Delta, name: str, value: Tensor) -> None:
    parameter = delta.get_parameter(name)
    parameter.data = value.detach().reshape(parameter.shape).clone(memory_format=torch.contiguous_format)


__all__ = ["Computed", "combine", "to_lora"]
