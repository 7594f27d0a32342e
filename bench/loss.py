"""How much memory and time does a language model's loss take, with the logits whole and in chunks?

    .venv/bin/python bench/loss.py [--full]

Head and loss alone, forward and backward to the hidden states, with a frozen head: the loss of transformers on whole
logits against `veneer.chunk_loss`'s, and this once more where only half of the tokens are learned, as answers are.
Each runs in a process of its own, one after the other, several times; memory is the growth of the highest resident size
(VmHWM, reset when weights and hidden states are there), time the least of the steps, by the clock and of the processor,
which other work on the machine disturbs less. 1,024 tokens of width 256 in float32 and a vocabulary of 131,072, one
step; with --full 4,096 of width 576 in bfloat16, two steps, twice. Prints a table; the figures of a named machine are
kept in bench/results/.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import NamedTuple

import torch
import transformers
from process_memory import apart, forget_peak, status
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from veneer.ops.loss import chunk_length, summed_cross_entropy
from veneer.train.machine import fitted_to_machine

VOCABULARY = 2**17
WAYS = {
    "stock": ("stock", 1.0),
    "chunked": ("chunked", 1.0),
    "stock, half": ("stock", 0.5),
    "chunked, half": ("chunked", 0.5),
}


class Size(NamedTuple):
    """What a step's loss is of, and how often it is measured."""

    tokens: int
    width: int
    dtype: torch.dtype
    steps: int
    rounds: int


SMALL, FULL = Size(1024, 256, torch.float32, 1, 1), Size(4096, 576, torch.bfloat16, 2, 2)


def measure(way: str, size: Size) -> dict[str, float]:
    torch.manual_seed(0)
    kind, share = WAYS[way]
    head = nn.Linear(size.width, VOCABULARY, bias=False, dtype=size.dtype).requires_grad_(False)
    hidden = torch.randn(1, size.tokens, size.width, dtype=size.dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (1, size.tokens))
    labels[:, : round((1 - share) * size.tokens)] = -100

    def step(length: int) -> float:
        x, y = hidden[:, :length], labels[:, -length:]
        if kind == "stock":
            loss = ForCausalLMLoss(head(x), y, VOCABULARY)
        else:
            wanted = nn.functional.pad(y, (0, 1), value=-100)[:, 1:]
            learned = wanted != -100
            loss = summed_cross_entropy(x[learned], wanted[learned], head, chunk_length(VOCABULARY)) / learned.sum()
        loss.backward()
        hidden.grad = None
        return float(loss.detach())

    step(64)  # so that all code is loaded
    forget_peak()
    before, seconds, cpu = status(), [], []
    for _ in range(size.steps):
        start, busy = time.perf_counter(), time.process_time()
        loss = step(size.tokens)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
    return {"memory": status() - before, "seconds": min(seconds), "cpu": min(cpu), "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="as many tokens as a real batch, and several rounds")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="which to measure, of those in the table")
    parser.add_argument("--only", metavar="WAY", help="measure one, in this process")
    asked = parser.parse_args()
    size = FULL if asked.full else SMALL
    if asked.only:
        with fitted_to_machine():
            print(json.dumps(measure(asked.only, size)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in asked.ways}
    for _ in range(size.rounds):
        for way in asked.ways:
            found[way].append(apart("--only", way))
    table = Table("loss", "memory MiB", "of stock", "step s", "of stock", "CPU s", "of stock", "value")
    for way, runs in found.items():
        stock = found["stock, half" if "half" in way else "stock"]
        cells = []
        for key, shown, unit in (("memory", ".0f", 2**20), ("seconds", ".2f", 1), ("cpu", ".2f", 1)):
            cells.append(", ".join(f"{run[key] / unit:{shown}}" for run in runs))
            cells.append(f"{min(run[key] for run in runs) / min(run[key] for run in stock):.3f}")
        table.add_row(way, *cells, f"{runs[0]['loss']:.6f}")
    console = Console()
    console.print(
        f"{size.tokens} tokens, vocabulary {VOCABULARY}, width {size.width}, {size.dtype}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    console.print(table)


if __name__ == "__main__":
    main()
