"""A recipe on two processes, started by torchrun, trains what one process trains, and either goes on from the other.

This file is the test and, run as a program by torchrun, what each of the processes does: `test_processes.py RECIPE`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import small_run
import torch
from rich.console import Console
from torch import Tensor

import veneer
from veneer.errors import RecipeError

EVENLY = [
    "data={path: chats.jsonl, held_out: 12, limit: 28}",
    "method={LoRA: {dropout: 0.0}}",
    "training.steps=6",
    "training.keep_checkpoints=9",
]
"""16 rows and steps of 4: each epoch is whole for one process and for two, and none of them draws its own dropout."""
WAYS = {
    "ddp": ["training.micro_batch_size=1"],
    "fsdp": ["training.parallel=fsdp"],
    "nf4": ["training.parallel=fsdp", "model.quantization=nf4", "evaluation.keep=best"],
    "bitsandbytes": ["training.parallel=fsdp", "model.quantization=bitsandbytes-4bit"],
}
ALONE = {"nf4": "one-nf4", "bitsandbytes": "one-bitsandbytes"}
"""The runs of one process that those on other bases are held to."""
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def go(recipe: Path, name: str, *overrides: str, resume: bool = False) -> veneer.train.Result:
    output = f"output={recipe.parent / name}"
    return veneer.train(recipe, [*EVENLY, output, *overrides], resume=resume, console=Console(quiet=True))


def work(recipe: Path) -> None:
    """What each process does: every way, then the rest of a run that one process began."""
    for name, overrides in WAYS.items():
        result = go(recipe, name, *overrides)
        if "training.parallel=fsdp" in overrides:
            base = [p for key, p in result.model.named_parameters() if ".layers." in key and ".adapters." not in key]
            assert all(p.to_local().numel() < p.numel() for p in base if p.numel() > 1)
    go(recipe, "begun", "training.parallel=fsdp", resume=True)


def tensors(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")


def interrupt(finished: Path, begun: Path, step: int) -> None:
    """Leave of a finished run what a kill would have left after a step."""
    shutil.copytree(finished, begun)
    shutil.rmtree(begun / "adapter")
    (begun / "report.json").unlink()
    for path in (begun / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe that one process has run, and two processes every way."""
    recipe = small_run.make(tmp_path_factory.mktemp("processes"))
    go(recipe, "one")
    go(recipe, "one-nf4", "model.quantization=nf4", "evaluation.keep=best")
    go(recipe, "one-bitsandbytes", "model.quantization=bitsandbytes-4bit")
    interrupt(recipe.parent / "one", recipe.parent / "begun", 2)
    here = Path(__file__).parent
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": f"{Path(veneer.__file__).parents[1]}:{here}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, str(recipe)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return recipe.parent


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_train_what_one_trains(folder, name):
    close = {"rtol": 1e-3, "atol": 2e-4} if name == "bitsandbytes" else CLOSE  # its products are rounded to bfloat16
    torch.testing.assert_close(tensors(folder / name), tensors(folder / ALONE.get(name, "one")), **close)


@pytest.mark.parametrize("name", ["begun", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(folder, name):
    if name == "fsdp":
        interrupt(folder / "fsdp", folder / "rest", 2)
        go(folder / "recipe.yaml", "rest", resume=True)
    found = tensors(folder / ("rest" if name == "fsdp" else name))
    torch.testing.assert_close(found, tensors(folder / "one"), **CLOSE)


def test_processes_share_a_step_evenly(folder, monkeypatch):
    monkeypatch.setattr("veneer.train.refusing.processes", lambda: SimpleNamespace(num_processes=3))
    with pytest.raises(RecipeError, match="batch_size 4 is not divided by what 3 processes compute at once, 3"):
        go(folder / "recipe.yaml", "never")


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
