"""A process of its own for what a bench measures, and the memory of a process as it is read there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROCESS = Path("/proc/self")


def status(field: str = "VmHWM") -> int:
    """Bytes that are resident: the most so far, or with VmRSS, RssAnon, RssFile at present."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """From now on the most is that from here."""
    (PROCESS / "clear_refs").write_text("5")


def apart(*arguments: str, environment: Mapping[str, str] = os.environ) -> Any:
    """What this script prints last, as JSON, where it is called once more with these arguments beside its own."""
    command = [sys.executable, *sys.argv, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(ran.stdout.splitlines()[-1])
