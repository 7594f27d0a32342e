"""Files and folders that are either whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """Where converted samples are kept: $VENEER_CACHE, or ~/.cache/veneer."""
    return Path(os.environ.get("VENEER_CACHE") or Path.home() / ".cache" / "veneer")


def cached(name: str, write: Callable[[Path], object], cache: Path | None = None) -> Path:
    """The folder `name` in the cache (default `cache_dir()`), made by `write(empty folder)` the first time.

    No lock: two processes may do the work twice, and the second to finish throws its copy away.
    """
    place = (cache or cache_dir()) / name
    if place.is_dir():
        return place
    with _beside(place) as scratch:
        made = Path(scratch) / name
        made.mkdir()
        write(made)
        try:
            made.rename(place)
        except OSError:
            if not place.is_dir():
                raise
    return place


def replace(place: Path, write: Callable[[Path], object]) -> Path:
    """Writes a file or a folder with `write(path)` and puts it where an older one may be; a failed write keeps that."""
    with _beside(place) as scratch:
        made = Path(scratch) / place.name
        write(made)
        if place.is_dir():  # a rename over a folder that is not empty is refused
            place.rename(Path(scratch) / "old")
        made.replace(place)
    return place


def _beside(place: Path) -> tempfile.TemporaryDirectory[str]:
    """A scratch folder on the same disk as `place`, so that renaming out of it is one step."""
    place.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent)
