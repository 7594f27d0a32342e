"""The lines of a table of plans: methods by the names that a command line has for them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from veneer import methods
from veneer.errors import PlanError, closest
from veneer.quantizing import NF4

_SHORT = {
    "adapter": "bottleneckadapter",
    "prefix": "prefixtuning",
    "prompt": "prompttuning",
    "layernorm": "layernormtuning",
}
_CLASSES = {name.lower(): vars(methods)[name] for name in methods.__all__}
_BEYOND = ("adapterfusion", "gated", "trainabletokens")
"""They are made of other adapters, or need to be told what to train."""
_NEEDED = {"adalora": {"total_steps": 1000}}
"""Options without a default, which change no count."""
USUAL = (
    *("full", "lora", "qlora", "dora", "ia3", "prefix", "prompt", "adapter", "bitfit", "layernorm"),
    "lora+prefix",
)


@dataclass(frozen=True)
class Line:
    """A name as it was given, the method that it means, and how the base is stored."""

    name: str
    method: Any
    quantization: NF4 | None


def line(text: str, quantization: NF4 | None = None) -> Line:
    """`lora`, `lora:rank=16,alpha=32`, `qlora` (LoRA on 4 bits), `full`, `none`, `lora+prefix` (both), as a method.

    Raises PlanError for an unknown name, MethodError for an option that the method does not take.
    """
    name = text.lower().replace("_", "").replace("-", "")
    if name == "none":
        return Line(text, None, quantization)
    if name == "full":
        return Line(text, "full", None)
    parts = [part.partition(":") for part in text.split("+")]
    made: dict[str, Any] = {}
    for given, _, options in parts:
        low = given.strip().lower().replace("_", "").replace("-", "")
        if low == "qlora":
            low, quantization = "lora", quantization or NF4()
        low = _SHORT.get(low, low)
        if low not in _CLASSES:
            known = ["full", "none", "qlora", *_SHORT, *_CLASSES]
            raise PlanError(f"There is no method '{given}'.{closest(low, known)} All: {', '.join(known)}.")
        try:
            method = _CLASSES[low](**_NEEDED.get(low, {}) | _options(options))
        except TypeError as error:
            raise PlanError(f"{given}: {str(error).partition(' ')[2]}.") from None
        if len(parts) == 1:
            return Line(text, method, quantization)
        made[_CLASSES[low].default_where] = method
    return Line(text, made, quantization)


def _options(text: str) -> dict[str, Any]:
    found = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise PlanError(f"'{part}' is no option; write it as rank=8.")
        try:
            found[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key.strip()] = value
    return found


def every() -> list[str]:
    """All methods that can be planned with their defaults."""
    short = {value: key for key, value in _SHORT.items()}
    names = [short.get(name, name) for name in _CLASSES if name not in _BEYOND and name != "fullfinetuning"]
    return ["full", "qlora", *names, "lora+prefix"]
