"""Two processes that accelerate launches train what one trains: a recipe, and a plain accelerate loop.

This file is the test and, run as a program, the loop: `test_launching.py FOLDER`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import small_run
import torch
from accelerate import Accelerator
from rich.console import Console
from test_processes import CLOSE, EVENLY, tensors
from tiny import FAMILIES, IDS
from torch.utils.data import DataLoader

import veneer

ROWS = torch.cat([IDS, IDS.flip(1), IDS.roll(1, dims=1)])[:4].repeat(2, 1)


def loop(folder: Path, processes: int) -> None:
    """A loop as in accelerate's documentation, on a model that carries an adapter."""
    model = FAMILIES["llama"].model()
    torch.manual_seed(0)
    adapter = veneer.attach(model, veneer.LoRA(rank=2))
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == processes
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    rows = DataLoader(ROWS, batch_size=4 // processes)
    prepared, optimizer, rows = accelerator.prepare(model, optimizer, rows)
    for ids in rows:
        optimizer.zero_grad()
        accelerator.backward(prepared(input_ids=ids, labels=ids).loss)
        optimizer.step()
    if accelerator.is_main_process:
        safetensors.torch.save_file(adapter.state_dict(), folder / f"{processes}.safetensors")


def launched(*words: object) -> subprocess.CompletedProcess[str]:
    """`accelerate launch WORDS` with two processes of this machine's processor."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(port), *map(str, words)]
    paths = f"{Path(veneer.__file__).parents[1]}:{Path(__file__).parent}"
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def test_a_loop_trains_what_one_process_trains(tmp_path):
    done = launched(__file__, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    loop(tmp_path, 1)
    one, two = (safetensors.torch.load_file(tmp_path / f"{number}.safetensors") for number in (1, 2))
    torch.testing.assert_close(two, one, **CLOSE)
    assert all(value.any() for value in two.values())


@pytest.mark.slow
def test_a_recipe_trains_what_one_process_trains(tmp_path):
    recipe = small_run.make(tmp_path)
    done = launched("-m", "veneer", "train", recipe, *EVENLY, f"output={tmp_path / 'two'}", "--json")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count('"output"') == 1  # the other process writes nothing
    veneer.train(recipe, [*EVENLY, f"output={tmp_path / 'one'}"], console=Console(quiet=True))
    torch.testing.assert_close(tensors(tmp_path / "two"), tensors(tmp_path / "one"), **CLOSE)


if __name__ == "__main__":
    loop(Path(sys.argv[1]), 2)
