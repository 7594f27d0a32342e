"""What the scripts for vLLM and SGLang share: importing their code, and comparing what stands in their buffers.

What only their kernels and their front need, and is not installed, is stood in for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from torch import Tensor


class StandIn(ModuleType):
    """A module that has every name: classes that can be inherited from, and functions that take everything."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {}) if name[0].isupper() and not name.isupper() else MagicMock(name=name)
        setattr(self, name, made)
        return made


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for modules below the packages in `roots` with objects that take everything."""

    def __init__(self, roots: Sequence[str] = ()) -> None:
        self.roots = list(roots)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not any(name == root or name.startswith(f"{root}.") for root in self.roots):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def imported(names: Sequence[str], roots: Sequence[str] = ()) -> list[str]:
    """Import the modules with `roots` stood in for, and packages that are missing; all that are stood in for."""
    finder = StandIns(roots)
    sys.meta_path.insert(0, finder)
    for name in names:
        while True:
            try:
                importlib.import_module(name)
                break
            except ModuleNotFoundError as error:
                missing = error.name or ""
                own = name.partition(".")[0]
                root = missing if missing.startswith(f"{own}.") else missing.partition(".")[0]
                if not missing or root in finder.roots or root == own:
                    raise
                finder.roots.append(root)
                for orphan in [one for one in sys.modules if one.startswith(f"{own}.")]:
                    if orphan.rpartition(".")[0] not in sys.modules:
                        del sys.modules[orphan]
    return finder.roots


def compared(seen: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, str]:
    """Whether the changes of parameters that a server's buffers mean are those of the adapter."""
    expected = {key: change for key, change in changes.items() if change.any()}
    apart = max(
        (float((seen[key] - change).abs().max()) for key, change in expected.items() if key in seen), default=0.0
    )
    gone = [key for key in expected if key not in seen]
    more = [key for key, change in seen.items() if change.any() and key not in expected]
    why = f"{apart:.1e} apart" + f", without {gone}" * bool(gone) + f", more {more}" * bool(more)
    return {"verdict": "taken" if apart < 1e-4 and not gone and not more else "wrong", "why": why}
