"""How much memory does an optimizer need beside parameters and gradients, and how long does its step take?

    .venv/bin/python bench/paged.py [--full] [--folder FOLDER]

Each optimizer trains the same float32 parameters, 50 million or with --full 200, in a process of its own. Memory is the
growth of the process's highest resident size (VmHWM, reset when parameters and gradients are there) over all steps;
pages of mapped files count, what the kernel caches of files that are read and written does not. Time is the least of
the steps but the first, by the clock and of the processor, which what else runs on the machine disturbs less. Prints a
table; the figures of a named machine are kept in bench/results/.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings

import bitsandbytes
import torch
from process_memory import apart, forget_peak, status
from rich.console import Console
from rich.table import Table

import veneer

STEPS = 3
TENSORS = 20
MIB = 2**20
KINDS = {
    "torch AdamW": lambda params, folder: torch.optim.AdamW(params),
    "bitsandbytes AdamW8bit": lambda params, folder: bitsandbytes.optim.AdamW8bit(params),
    "bitsandbytes PagedAdamW": lambda params, folder: bitsandbytes.optim.PagedAdamW(params),
    **{
        f"veneer PagedAdamW, window {size} MiB": lambda params, folder, size=size: veneer.PagedAdamW(
            params, window=size * MIB, folder=folder
        )
        for size in (4, 16, 64, 256)
    },
}


def measure(kind: str, millions: int, folder: str | None) -> dict[str, float]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # bitsandbytes says that it pages nothing on a CPU, which the table shows
    params = [torch.nn.Parameter(torch.ones(millions * 10**6 // TENSORS)) for _ in range(TENSORS)]
    for parameter in params:
        parameter.grad = torch.full_like(parameter, 0.1)
    small = torch.nn.Parameter(torch.ones(8192))
    small.grad = torch.ones_like(small)
    KINDS[kind]([small], folder).step()  # so that all code is loaded
    forget_peak()
    before, seconds, cpu = status(), [], []
    optimizer = KINDS[kind](params, folder)
    for _ in range(STEPS):
        start, busy = time.perf_counter(), time.process_time()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
    return {"memory": status() - before, "seconds": min(seconds[1:]), "cpu": min(cpu[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="200 million parameters")
    parser.add_argument("--folder")
    parser.add_argument("--kind", choices=KINDS)
    asked = parser.parse_args()
    millions = 200 if asked.full else 50
    if asked.kind:
        print(json.dumps(measure(asked.kind, millions, asked.folder)))
        return
    table = Table("optimizer", "memory MiB", "step s", "CPU s", "CPU / AdamW")
    plain = 0.0
    for kind in KINDS:
        found = apart("--kind", kind)
        plain = plain or found["cpu"]
        figures = (found["memory"] / MIB, found["seconds"], found["cpu"], found["cpu"] / plain)
        table.add_row(kind, *(f"{figure:.{digits}f}" for figure, digits in zip(figures, (0, 2, 2, 2), strict=True)))
    versions = f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}, one thread"
    Console().print(f"{millions} million float32 parameters in {TENSORS} tensors; {versions}")
    Console().print(table)


if __name__ == "__main__":
    main()
