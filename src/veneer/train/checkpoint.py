"""Checkpoints that are whole or not there: written aside, synced, renamed, and named by their checksums.

A folder `checkpoint-N` holds what a run needs to go on after step N, and `checksums.json` with the SHA-256 of each of
its files. A kill at any moment leaves the folders before it as they were.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from veneer import files
from veneer.errors import RunError
from veneer.train.processes import processes

SUMS = "checksums.json"
_ASIDE = ".writing"


@contextlib.contextmanager
def locked(folder: Path, first: bool = True) -> Iterator[None]:
    """The folder for this run alone; RunError where another one writes into it, or it cannot be written.

    Of several processes of one run only the `first` takes it.
    """
    if not first:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}. Name another output.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"Another run is writing into {folder}. Wait for it, or name another output.") from None
        yield


@contextlib.contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """A folder for the time of a run; what a killed run left in it goes first."""
    shutil.rmtree(place, ignore_errors=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write(folder: Path, step: int, fill: Callable[[Path], object], keep: int) -> Path:
    """Make `checkpoint-<step>` of what `fill` writes into an empty folder, and delete all but the last `keep`.

    Every process of a run calls it and fills in its part; the first one does the rest.
    """
    aside, place, state = folder / _ASIDE, folder / f"checkpoint-{step}", processes()
    try:
        if state.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        state.wait_for_everyone()
        fill(aside)
        state.wait_for_everyone()
        if state.is_main_process:
            _finish(aside, place)
        state.wait_for_everyone()
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        why = _full(error)
        if why is None:
            raise
        there = steps(folder)
        last = f"checkpoint-{there[-1]} is whole" if there else "there is none yet"
        raise RunError(
            f"Step {step} could not be saved in {folder}: {why}; {last}. Make room, then go on with --resume."
        ) from None
    if state.is_main_process:
        for old in steps(folder)[:-keep]:
            shutil.rmtree(folder / f"checkpoint-{old}")
    return place


def _finish(aside: Path, place: Path) -> None:
    """Put what was written aside in its place, with its checksums."""
    sums = {path.name: _digest(path) for path in sorted(aside.iterdir())}
    (aside / SUMS).write_text(json.dumps(sums, indent=2), encoding="utf-8")
    for path in aside.iterdir():
        files.sync(path)
    files.sync(aside)
    shutil.rmtree(place, ignore_errors=True)
    aside.rename(place)
    files.sync(place.parent)


def newest(folder: Path, say: Callable[[str], object]) -> Path | None:
    """The last checkpoint whose checksums hold; what is passed over is said, with the reason."""
    for step in reversed(steps(folder)):
        place = folder / f"checkpoint-{step}"
        damage = wrong(place)
        if damage is None:
            return place
        say(f"{place} is damaged ({damage}); going on from the one before.")
    return None


def steps(folder: Path) -> list[int]:
    """The steps of a folder's checkpoints, in order."""
    if not folder.is_dir():
        return []
    numbers = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
    return sorted(int(number) for number in numbers if number.isdigit())


def wrong(place: Path) -> str | None:
    """What is damaged about a checkpoint, by its checksums; None where it is whole."""
    try:
        sums = json.loads((place / SUMS).read_text(encoding="utf-8"))
        for name, sum_ in sums.items():
            if _digest(place / name) != sum_:
                return f"{name} has changed"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _full(error: BaseException) -> str | None:
    """Why a disk did not take a file, if that is what an error is about; safetensors and torch say it in texts."""
    number = error.errno if isinstance(error, OSError) else None
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG):
        if number == code or os.strerror(code) in str(error):
            return os.strerror(code)
    if isinstance(error, RuntimeError) and "PytorchStreamWriter failed" in str(error):
        return "a file could not be written"
    return None
