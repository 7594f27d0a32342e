"""The libraries of the extra `train`, and the exact command where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from veneer.errors import DataError


def extra(name: str) -> Any:
    """A module that `pip install 'veneer[train]'` brings."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        raise DataError(f"The module {missing.name} is not installed. Run: pip install 'veneer[train]'") from missing
