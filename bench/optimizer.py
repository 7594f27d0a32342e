"""How long does an optimizer's step over an adapter of many small tensors take?

    .venv/bin/python bench/optimizer.py [--rounds 15] [--layers 32]

The float32 tensors of a LoRA of rank 8 on the seven linears of each block, in two groups as LoRA+ has them. A step is
clipping, AdamW and zeroing. Veneer's FlatAdamW and torch's AdamW in its three forms, each on parameters of its own, run
turn by turn in one process. Every round also gives new gradients, which is not timed: as tensors of their own, as
backward makes them after `zero_grad()`, or in place ("kept", `zero_grad(set_to_none=False)`). A ratio is that of a
round, of the processor's time; printed are the median and the middle half. At the end parameters are compared bit for
bit with the for loop's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import veneer

RANK = 8
KINDS = {
    "torch, for loop": lambda groups: torch.optim.AdamW(groups, foreach=False),
    "torch, foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "torch, fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "veneer flat": lambda groups: veneer.FlatAdamW(groups),
    "veneer flat, kept": lambda groups: veneer.FlatAdamW(groups),
    "veneer flat, fused": lambda groups: veneer.FlatAdamW(groups, fused=True),
    "veneer flat, fused, kept": lambda groups: veneer.FlatAdamW(groups, fused=True),
}


def parameters(layers: int, width: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    wide = width * 8 // 3
    shapes = [(width, width)] * 4 + [(width, wide)] * 2 + [(wide, width)]
    sizes = [size for _ in range(layers) for in_, out in shapes for size in ((RANK, in_), (out, RANK))]
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=1024)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    held, optimizers = {}, {}
    for name, build in KINDS.items():
        params = held[name] = parameters(asked.layers, asked.width)
        optimizers[name] = build([{"params": params[::2], "lr": 1e-3}, {"params": params[1::2], "lr": 1.6e-2}])
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    for turn in range(asked.rounds + 1):
        given = [torch.randn_like(p) for p in held["veneer flat"]]
        for name, optimizer in optimizers.items():
            kept = name.endswith("kept")
            for parameter, gradient in zip(held[name], given, strict=True):
                if kept and parameter.grad is not None:
                    parameter.grad.copy_(gradient)
                else:
                    parameter.grad = gradient.clone()
            start = time.process_time()
            if isinstance(optimizer, veneer.FlatAdamW):
                optimizer.clip_grad_norm_(1e9)
            else:
                torch.nn.utils.clip_grad_norm_(held[name], 1e9)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not kept)
            if turn:
                times[name].append(time.process_time() - start)
    table = Table("optimizer", "step ms", "for loop / this", "the bits of the for loop")
    plain = times["torch, for loop"]
    for name in KINDS:
        low, middle, high = statistics.quantiles([a / b for a, b in zip(plain, times[name], strict=True)], n=4)
        same = all(map(torch.equal, held[name], held["torch, for loop"]))
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        table.add_row(name, f"{statistics.median(times[name]) * 1e3:.1f}", ratio, "yes" if same else "no")
    tensors = held["veneer flat"]
    count = sum(p.numel() for p in tensors)
    Console().print(f"{len(tensors)} tensors, {count / 1e6:.1f} million numbers; torch {torch.__version__}, one thread")
    Console().print(table)


if __name__ == "__main__":
    main()
