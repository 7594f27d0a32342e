"""What the laws are held against: every method, each group of them in a file of its own here, found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tiny import FAMILIES

import veneer

SHARED_BY_ROWS = "every row of a batch shares"
ACTIVATIONS = "acts on activations; it has no merged weight"
TOKENS = tuple(name for name in FAMILIES if name != "vit")
"""Families that embed tokens."""
BIASED = tuple(name for name, family in FAMILIES.items() if family.biases)
"""Families with biases to train."""
CALLED = tuple(name for name in FAMILIES if name != "mixtral")
"""Families whose mlp.down is a layer that is called; experts are read."""

Stated = tuple[type[Exception], str]
"""The error by which Veneer says that a law cannot hold, and words of its message."""


@dataclass(frozen=True)
class Subject:
    """One method with options, and what is said of it that is not said of every method.

    `identity`: it changes nothing before training. `families`: those it can stand on at all; the others have no such
    place. `impossible` maps a law's name to the error that states why it cannot hold, on every family or, with a
    function of the family's name, on some.
    """

    method: veneer.Method
    identity: bool = True
    where: str | None = None
    families: tuple[str, ...] = tuple(FAMILIES)
    impossible: Mapping[str, Stated | Callable[[str], Stated | None]] = field(default_factory=dict)

    def stated(self, law: str, family: str) -> Stated | None:
        """The error that states why this law cannot hold here, or None where it must."""
        found = self.impossible.get(law)
        return found(family) if callable(found) else found


SUBJECTS: dict[str, Subject] = {}
for _module in pkgutil.iter_modules(__path__):
    SUBJECTS.update(importlib.import_module(f"{__name__}.{_module.name}").SUBJECTS)
