"""Triton's kernels for low-rank pairs: their numbers in Triton's interpreter, their code for two GPUs, and on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veneer.ops import dropout, kernels, lora

pytest.importorskip(
    "triton", reason="Triton is not installed: its kernels go untested. Install veneer[test] on Linux."
)

INTERPRETED = Path(__file__).with_name("interpreted_lora.py")


def test_numbers_are_those_of_the_reference_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)],
        env={**os.environ, "TRITON_INTERPRET": "1"},  # read when Triton is imported, so this needs a new process
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:]


