"""What memory do batches of many lengths take on a CPU?

    .venv/bin/python bench/lengths.py [--full]

A process grows with each new length: in bfloat16 by the kernels that oneDNN compiles for its shapes, in any dtype by
holes in malloc's heap. Forward and backward of LoRA on all linears of a Llama of SmolLM2's width, a batch of each of 35
lengths, shuffled, in float32 and bfloat16: PEFT's, Veneer's, and Veneer's as `train` does it, with fewer kernels kept
and huge pages; each in a process of its own, by turns. Memory is the highest resident size (VmHWM) over all steps, less
what the process had before the first; seconds are of all steps. Four blocks and one turn; with --full 30 blocks and
three turns. Prints a table; the figures of a named machine are kept in bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch
import transformers
from process_memory import apart, forget_peak, status
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer.environment import SPARING

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
SHORTEST, LENGTHS, ROWS, VOCABULARY = 30, 35, 8, 4096
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WAYS = ("PEFT", "Veneer", "Veneer in train")
DTYPES = ("float32", "bfloat16")


def measure(way: str, dtype: str, blocks: int) -> dict[str, float]:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=blocks, **SIZES)
    model = LlamaForCausalLM(config).to(vars(torch)[dtype]).train().requires_grad_(False)
    if way == WAYS[0]:
        from peft import LoraConfig, get_peft_model

        run = get_peft_model(model, LoraConfig(r=8, target_modules=LINEARS))
    else:
        veneer.attach(model, veneer.LoRA(rank=8))
        run = model

    def step(length: int) -> None:
        ids = torch.randint(0, VOCABULARY, (ROWS, length))
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        run.zero_grad()

    torch.set_num_threads(1)
    step(8)  # so that all code is loaded
    forget_peak()
    before, start = status("VmRSS"), time.perf_counter()
    for turn in range(LENGTHS):
        step(SHORTEST + turn * 17 % LENGTHS)
    return {"memory": status() - before, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="30 blocks, three turns")
    parser.add_argument("--only", nargs=2, metavar=("WAY", "DTYPE"), help="measure one, in this process")
    asked = parser.parse_args()
    blocks, turns = (30, 3) if asked.full else (4, 1)
    if asked.only:
        print(json.dumps(measure(*asked.only, blocks)))
        return
    plain = {name: value for name, value in os.environ.items() if name not in SPARING}
    table = Table("LoRA", "dtype", "memory, MiB", "of PEFT's", "seconds", "of PEFT's")
    for dtype in DTYPES:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(turns):
            for way in WAYS:
                told = plain | SPARING if way == WAYS[2] else plain
                found[way].append(apart("--only", way, dtype, environment=told))
        for way, rows in found.items():
            cells = []
            for what, unit, digits in (("memory", 2**20, 0), ("seconds", 1, 1)):
                ratios = [row[what] / peft[what] for row, peft in zip(rows, found[WAYS[0]], strict=True)]
                cells.append(f"{statistics.median(row[what] for row in rows) / unit:,.{digits}f}")
                cells.append(" ".join(f"{ratio:.2f}" for ratio in ratios))
            table.add_row(way, dtype, *cells)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, one thread"
    table.caption = f"{LENGTHS} lengths, {blocks} blocks, {ROWS} rows; {versions}"
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
