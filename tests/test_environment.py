"""What torch is told of memory: that it acts, that what is set already stands, and that the command says it."""

import os
import subprocess
import sys

import pytest
import torch

from veneer.environment import SPARING, spare_memory

GROWTH = """
import torch
{told}
def now():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
weight = torch.ones(96, 96, dtype=torch.bfloat16)
for rows in range(8, 16):
    torch.nn.functional.linear(torch.ones(rows, 96, dtype=torch.bfloat16), weight)
before = now()
for rows in range(16, 316):
    torch.nn.functional.linear(torch.ones(rows, 96, dtype=torch.bfloat16), weight)
print(now() - before)
"""


def printed(code: str) -> str:
    """The last line of a process that runs the code and starts without SPARING."""
    plain = {name: value for name, value in os.environ.items() if name not in SPARING}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=plain)
    return ran.stdout.splitlines()[-1]


def test_what_the_environment_says_already_stands(monkeypatch):
    for name in SPARING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    spare_memory()
    assert {name: os.environ[name] for name in SPARING} == SPARING | {"LRU_CACHE_CAPACITY": "7"}


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN does not multiply bfloat16 here")
def test_kernels_for_more_shapes_than_are_kept_take_no_more_memory():
    """In processes of their own, and after torch was imported: the first product reads what was set by then."""
    told = "from veneer.environment import spare_memory; spare_memory()"
    grown = [int(printed(GROWTH.format(told=what))) for what in ("", told)]
    assert grown[1] < 0.7 * grown[0], grown


def test_the_command_sets_it_before_anything_else():
    code = "import os, sys; from veneer.cli import main; sys.argv = ['veneer', '--version']\n"
    code += "try: main()\nexcept SystemExit: print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    assert printed(code) == "1"
