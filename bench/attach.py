"""How long does attaching take, and does it grow linearly? Veneer beside peft, on the meta device, in one process.

    .venv/bin/python bench/attach.py

Prints a table; the figures of a named machine are kept in bench/results/.
"""

from __future__ import annotations

import platform
import time
import warnings

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer

ROUNDS = 3
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Blocks(nn.Module):
    """`count` linears of width 8, each in a block of its own."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8, 8)}) for _ in range(count))


def llama_7b() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=32000))


def seconds(build, attach) -> float:
    """The least time of a few rounds, each on a new model."""
    best = float("inf")
    for _ in range(ROUNDS):
        with torch.device("meta"):
            model = build()
        start = time.perf_counter()
        attach(model)
        best = min(best, time.perf_counter() - start)
    return best


def attach_veneer(model: nn.Module) -> None:
    veneer.attach(model, veneer.LoRA(rank=8))


def attach_peft(model: nn.Module) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=SEVEN))


def main() -> None:
    table = Table("model", "linears", "veneer s", f"peft {peft.__version__} s", "peft / veneer")
    rows = [("Llama-7B shape", 224, llama_7b)]
    rows += [("blocks", count, lambda count=count: Blocks(count)) for count in (1000, 2000, 4000)]
    for name, count, build in rows:
        ours, theirs = seconds(build, attach_veneer), seconds(build, attach_peft)
        table.add_row(name, str(count), f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.1f}")
    Console().print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, on the meta device")
    Console().print(table)


if __name__ == "__main__":
    main()
