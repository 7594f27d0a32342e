"""Law 16: under DDP and FSDP2 on two processes, every adapter gets the gradients that one process gets.

This file is the test and, run as a program, one of the two processes: `test_two_processes.py RANK FOLDER`.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import torch
from subjects import SUBJECTS, Subject
from tiny import FAMILIES, IDS, logits, perturb, text
from torch import Tensor, nn

import veneer
from veneer.delta import After, Before, Input, KeyValue, Weight

PORTS = (Before, After, KeyValue, Input, Weight)
WAYS = ("ddp", "fsdp")
PROCESSES = 2
ROWS = torch.cat([IDS, IDS.flip(1)[:1]])
"""Four rows: halves of one size, so that the mean over the processes' means is the mean over the batch."""


@functools.cache
def chosen() -> dict[str, Subject]:
    """The first method of each port, and every method that has modules at the root of the model."""
    found: dict[str, Subject] = {}
    unseen = set(PORTS)
    for name, subject in sorted(SUBJECTS.items(), key=lambda item: item[0] != "LoRA"):
        if "llama" in subject.families:
            adapter = attached(subject)[1]
            ports = {port for port in unseen if any(isinstance(claim.delta, port) for claim in adapter.claims)}
            if ports or adapter.shared:
                found[name] = subject
            unseen -= ports
    assert not unseen
    return found


def attached(subject: Subject) -> tuple[nn.Module, veneer.Adapter]:
    """The same model with the same adapter in every process."""
    model = FAMILIES["llama"].model()
    torch.manual_seed(0)
    adapter = veneer.attach(model, subject.method, subject.where)
    perturb(adapter)
    return model, adapter


def backward(model: nn.Module, rows: Tensor) -> None:
    logits(model, text(rows)).pow(2).mean().backward()


def gradients(adapter: veneer.Adapter) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor

    found = {}
    for key, parameter in adapter.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[key] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
    return found


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def refusal() -> str:
    """What attaching to a sharded model says; anything else ends the process."""
    model = shard(FAMILIES["llama"].model())
    before = [name for name, _ in model.named_parameters()]
    try:
        veneer.attach(model, veneer.LoRA())
    except veneer.errors.PlaceError as error:
        assert [name for name, _ in model.named_parameters()] == before, "the model was touched"
        assert all(parameter.requires_grad for parameter in model.parameters()), "the model was frozen"
        return str(error)
    return "attached"


def work(rank: int, folder: Path) -> None:
    """One process: half of the batch through every method, both ways."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    half = ROWS.chunk(PROCESSES)[rank]
    found = {}
    for name, subject in chosen().items():
        for way in WAYS:
            model, adapter = attached(subject)
            wrapped = DistributedDataParallel(model) if way == "ddp" else shard(model)
            backward(wrapped, half)
            found[name, way] = gradients(adapter)
    torch.save({"gradients": found, "refusal": refusal()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@functools.cache
def alone(name: str) -> dict[str, Tensor]:
    """One process and the whole batch."""
    model, adapter = attached(chosen()[name])
    backward(model, ROWS)
    return gradients(adapter)


def spawn(folder: Path) -> list[dict]:
    """What each of the two processes found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    try:
        for rank in range(PROCESSES):
            with (folder / f"{rank}.log").open("w") as log:
                command = [sys.executable, __file__, str(rank), str(folder)]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"{rank}.log").read_text() for rank in range(PROCESSES))
    assert codes == [0] * PROCESSES, logs
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def test_two_processes_do_what_one_does(tmp_path):
    """Under DDP and under FSDP2 two processes with half a batch each get the gradients of one with the whole."""
    for rank, result in enumerate(spawn(tmp_path)):
        assert result["gradients"].keys() == {(name, way) for name in chosen() for way in WAYS}
        for (name, way), found in result["gradients"].items():
            expected = alone(name)
            assert expected
            assert found.keys() == expected.keys(), (name, way)
            for key, gradient in expected.items():
                error = (found[key] - gradient).abs().max().item()
                assert error <= 1e-9 * gradient.abs().max().item(), f"{name}, {way}, process {rank}: {key} by {error}"
        assert "is already sharded" in result["refusal"]
        assert "call fully_shard" in result["refusal"]


def test_half_a_batch_has_other_gradients():
    """Else the law would hold without any exchange between the processes."""
    for name, subject in chosen().items():
        model, adapter = attached(subject)
        backward(model, ROWS.chunk(PROCESSES)[0])
        found = gradients(adapter)
        assert any((found[key] - gradient).abs().max() > 1e-6 for key, gradient in alone(name).items()), name


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
