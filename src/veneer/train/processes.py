"""The processes of one run, which torchrun or accelerate launch start: the first writes, all wait, and all agree.

Where there is one process, nothing here does anything.
"""

from __future__ import annotations

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import GenerationMixin

from veneer.seams.anatomy import outermost


def processes() -> PartialState:
    """accelerate's view of them; the first call joins their group."""
    return PartialState(cpu=not torch.accelerator.is_available())


def share_out(model: nn.Module) -> None:
    """Leave each process a part of each of the model's blocks, and of the rest (FSDP2), for good.

    accelerate does this on accelerators only, and trains whole models on CPUs without a word; a Trainer has to be told
    to leave such a model as it is.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(processes().device.type, (processes().num_processes,))
    for path in outermost(model):
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    if isinstance(model, GenerationMixin):
        register_fsdp_forward_method(model, "generate")


def largest(number: int) -> int:
    """The largest of the numbers that the processes bring."""
    state = processes()
    if state.num_processes == 1:
        return number
    told = torch.tensor(number, device=state.device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return int(told)
