"""The machine that figures were measured on."""

import os
import platform
import re
from pathlib import Path


def processor() -> str:
    """The processor's name as it gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def words() -> str:
    """The processor and how many of it."""
    return f"{processor()}, {os.cpu_count()} processors, {platform.system()}"


def short() -> str:
    """The same for the name of a file."""
    plain = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|@.*", " ", processor().lower())
    return "-".join([*re.findall(r"[a-z0-9]+", plain), f"{os.cpu_count()}-cores"])
