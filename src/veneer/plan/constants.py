"""How much of a device's rates a step reaches: assumed, until `veneer plan --calibrate` has measured it there."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer import files
from veneer.plan.devices import Device


@dataclass(frozen=True)
class Constants:
    """products, bandwidth: shares of the device's rates; call: seconds an operation takes beside its arithmetic.

    spread: the factor between the expected time and each end of its interval. measured: by calibration; otherwise they
    are assumptions, and the least time is that of the rates themselves.
    """

    products: float = 0.5
    bandwidth: float = 0.7
    call: float = 5e-6
    spread: float = 2.0
    measured: bool = False


def stored_in() -> Path:
    """The file of what was measured, in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veneer" / "plan.json"


def constants(device: Device) -> Constants:
    """Those of a device: as they were measured there, or the assumed ones."""
    found = _measured()
    return Constants(**found[device.name]) if device.name in found else Constants()


def keep(device: Device, measured: Constants) -> Path:
    """Store what was measured on a device, for every later plan."""
    path = stored_in()
    files.write(path.parent, {path.name: files.to_json(_measured() | {device.name: asdict(measured)})})
    return path


def _measured() -> dict[str, Any]:
    path = stored_in()
    return files.read_json(path) if path.exists() else {}
