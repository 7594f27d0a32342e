"""Who takes part in a comparison: methods by the short names of the field, with the options that a sweep varies."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from veneer import methods
from veneer.errors import RecipeError, closest
from veneer.train import lines
from veneer.train.method_sections import method_options
from veneer.train.recipe import Recipe

SHORT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora": ("LoRA", {}),
    "qlora": ("LoRA", {}),
    "dora": ("DoRA", {}),
    "prefix": ("PrefixTuning", {}),
    "prompt": ("PromptTuning", {}),
    "adapter": ("BottleneckAdapter", {"width": 64, "activation": "gelu", "where": "attention | mlp"}),
    "parallel": ("BottleneckAdapter", {"width": 512, "placement": "parallel", "scaling": 4.0, "where": "mlp"}),
    "full": ("FullFineTuning", {}),
}
"""name -> method and options: `adapter` is Houlsby's, `parallel` is He's; `qlora` has its base in four bits."""


@dataclass(frozen=True)
class Contender:
    """One method with its options, on a base that may be quantized for it."""

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    quantization: str | None = None
    rate: float | None = None

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        return re.sub(r"[^\w.=]+", "-", self.name).strip("-")

    @property
    def learning_rate(self) -> float:
        """The one that was given, or what the method likes."""
        return self.rate or float(vars(methods)[self.method].learning_rate)


def contenders(
    recipe: Recipe, names: Sequence[str], sweep: Mapping[str, Sequence[str]], rates: Mapping[str, float]
) -> list[Contender]:
    """The methods of these names, each with every combination of the swept options that it has, and these rates.

    A method takes the options that the recipe gives it; those of LoRA are for all methods that are a LoRA. RecipeError
    for an unknown name, a name twice, or a swept option or a rate that none of them has.
    """
    found: dict[str, Contender] = {}
    acted: set[str] = set()
    for name in names:
        plain = replace(_plain(recipe, name), rate=rates.get(name.strip().lower()))
        there = method_options()[plain.method].model_fields
        mine = {option: values for option, values in sweep.items() if option in there}
        acted |= mine.keys()
        for values in itertools.product(*mine.values()):
            chosen = dict(zip(mine, values, strict=True))
            told = " ".join(f"{option}={value}" for option, value in chosen.items())
            options = {**plain.options, **{option: lines.scalar(value) for option, value in chosen.items()}}
            one = replace(plain, name=f"{plain.name} {told}".strip(), options=options)
            if one.name in found:
                raise RecipeError(f"'{one.name}' is named twice among the methods. Name it once.")
            found[one.name] = one
    if idle := [option for option in sweep if option not in acted]:
        raise RecipeError(f"No compared method has the option {', '.join(idle)} of the sweep. Leave it out.")
    if unknown := sorted(rates.keys() - {name.strip().lower() for name in names}):
        raise RecipeError(f"A learning rate is given for {', '.join(unknown)}, which is not compared. Leave it out.")
    return list(found.values())


def _plain(recipe: Recipe, name: str) -> Contender:
    known = {each.lower(): each for each in method_options()}
    folded = name.strip().lower()
    if folded in SHORT:
        method, options = SHORT[folded]
    elif folded in known:
        method, options = known[folded], {}
    else:
        every = sorted({*SHORT, *known})
        raise RecipeError(f"'{name}' is no method.{closest(folded, every) or ' There are: ' + ', '.join(every) + '.'}")
    quantization = "nf4" if folded == "qlora" else recipe.model.quantization
    own = {} if folded == "parallel" else _of_recipe(recipe, method)  # the recipe's adapter is the other one
    return Contender(folded, method, {**options, **own}, quantization)


def _of_recipe(recipe: Recipe, method: str) -> dict[str, Any]:
    """The options that the recipe gives to this method, or, for a kind of LoRA, to LoRA."""
    told: dict[str, dict[str, Any]] = recipe.as_dict()["method"]
    if method in told:
        return told[method]
    if "LoRA" in told and issubclass(vars(methods)[method], methods.LoRA):
        there = method_options()[method].model_fields
        return {option: value for option, value in told["LoRA"].items() if option in there}
    return {}


def sweeps(texts: Iterable[str]) -> dict[str, list[str]]:
    """`option=a,b,c` as a mapping; RecipeError for any other text."""
    found: dict[str, list[str]] = {}
    for text in texts:
        option, equals, values = text.partition("=")
        listed = [value.strip() for value in values.split(",") if value.strip()]
        if not equals or not option.isidentifier() or len(listed) < 2:
            raise RecipeError(f"'{text}' is no sweep of an option over values, such as rank=4,8,16.")
        found[option] = listed
    return found


def learning_rates(text: str) -> dict[str, float]:
    """`lora=2e-3,full=1e-4` as a mapping; RecipeError for any other text."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, rate = part.partition("=")
        try:
            found[name.strip().lower()] = float(rate)
        except ValueError:
            raise RecipeError(f"'{part}' is no learning rate of a method, such as lora=2e-3.") from None
        if not 0 < found[name.strip().lower()] < float("inf"):
            raise RecipeError(f"'{part}': a learning rate is above zero.")
    return found
