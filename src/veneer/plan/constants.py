"""How much of a device's rates a step reaches: assumed, until `veneer plan --calibrate` has measured it there."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

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
    path = stored_in()
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return Constants(**found[device.name]) if device.name in found else Constants()


def keep(device: Device, measured: Constants) -> Path:
    """Store what was measured on a device, for every later plan."""
    path = stored_in()
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found[device.name] = asdict(measured)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return path
