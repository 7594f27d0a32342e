"""What does recomputing activations save, and what does backward below the lowest adapter cost?

    .venv/bin/python bench/checkpointing.py [--full]

One forward and backward of a Llama with LoRA in all blocks or in the upper quarter: without checkpointing, with
transformers' `activation_checkpointing_enable` alone, and with `veneer.checkpoint_activations`. Each runs in a process
of its own; memory is the growth of its highest resident size (VmHWM, reset when the model is there), time the least of
the steps, by the clock and of the processor. One step of rows of 256 tokens; with --full two of 512. Prints a table;
the figures of a named machine are kept in bench/results/.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import transformers
from process_memory import apart, forget_peak, status
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import veneer

LAYERS, ROWS = 16, 4
WHERE = {"all blocks": "linear", "upper quarter": " | ".join(f"model.layers.{n}.*_proj" for n in range(12, LAYERS))}
WAYS = {
    "none": lambda model: None,
    "transformers": lambda model: model.activation_checkpointing_enable(),
    "veneer": veneer.checkpoint_activations,
}


def measure(where: str, way: str, tokens: int, steps: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": LAYERS, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, **sizes)).train()
    veneer.attach(model, veneer.LoRA(rank=8), where=WHERE[where])
    WAYS[way](model)
    ids = torch.randint(0, 1024, (ROWS, tokens))
    model(input_ids=ids[:1, :8], labels=ids[:1, :8], use_cache=False).loss.backward()  # so that all code is loaded
    forget_peak()
    before, seconds, cpu = status(), [], []
    for _ in range(steps):
        start, busy = time.perf_counter(), time.process_time()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
    return {"memory": status() - before, "seconds": min(seconds), "cpu": min(cpu)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="rows of 512 tokens, and two steps")
    parser.add_argument("--only", nargs=2, metavar=("WHERE", "WAY"), help="measure one, in this process")
    asked = parser.parse_args()
    tokens, steps = (512, 2) if asked.full else (256, 1)
    if asked.only:
        print(json.dumps(measure(*asked.only, tokens, steps)))
        return
    table = Table("LoRA in", "checkpointing", "memory MiB", "step s", "CPU s", "CPU / none")
    for where in WHERE:
        plain = 0.0
        for way in WAYS:
            found = apart("--only", where, way)
            plain = plain or found["cpu"]
            times = (found["seconds"], found["cpu"], found["cpu"] / plain)
            table.add_row(where, way, f"{found['memory'] / 2**20:.0f}", *(f"{each:.2f}" for each in times))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, one thread"
    Console().print(f"{LAYERS} blocks of width 512, {ROWS} rows of {tokens} tokens, float32; {versions}")
    Console().print(table)


if __name__ == "__main__":
    main()
