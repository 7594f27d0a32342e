"""What do a mixture's experts in four bits save, while loading and in a step of LoRA on them?

    .venv/bin/python bench/experts.py

A Mixtral with random weights is written in bfloat16, one entry an expert as Mixtral's files have it, and loaded dense,
with its linears in NF4, and with its experts too, each in a process of its own, which then trains LoRA on attention and
experts for one step. Prints resident memory above what the libraries take: the greatest while loading, what is left
then, the greatest in the step. Dense, transformers maps the files, and their pages count.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers
from process_memory import forget_peak, status
from rich.console import Console
from rich.table import Table
from transformers import MixtralConfig, MixtralForCausalLM

import veneer
from veneer.formats.nf4_storage import Holder

MIB = 2**20
WAYS = {"dense": None, "linears in NF4": "linear", "linears and experts in NF4": ""}
VOCABULARY = 8000


def load(way: str, folder: str) -> torch.nn.Module:
    if WAYS[way] is None:
        return MixtralForCausalLM.from_pretrained(folder, dtype="auto")
    return veneer.load_quantized(folder, veneer.NF4(), WAYS[way] or None)


def step(model: torch.nn.Module, tokens: int) -> float:
    """One step of LoRA; returns the loss, which is that of the untrained adapter."""
    torch.manual_seed(1)
    adapter = veneer.attach(model, veneer.LoRA(rank=8), "linear | *.experts")
    optimizer = veneer.optimizer(adapter, "adamw", lr=1e-4)
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(2))
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def measure(way: str, small: str, large: str, tokens: int) -> None:
    """In a process of its own: bytes at the peak of loading, left, at the peak of the step, its seconds, loss, bits."""
    warnings.simplefilter("ignore")
    step(load(way, small), 16)  # what the libraries take, imports included
    forget_peak()
    before = status("VmRSS")
    model = load(way, large)
    print(status("VmHWM") - before, status("VmRSS") - before)
    forget_peak()
    start = time.perf_counter()
    loss = step(model, tokens)
    print(status("VmHWM") - before, time.perf_counter() - start, loss)
    held = [m.held(name) for m in model.modules() if isinstance(m, Holder) for name in m.facts]
    weights = sum(torch.Size(one.shape).numel() for one in held)
    print(weights, 8 * sum(one.size for one in held) / max(1, weights))


def write(folder: Path, layers: int, width: int) -> tuple[int, int]:
    """A random Mixtral; returns its parameters, and the bytes of its largest stack."""
    sizes = {"hidden_size": width, "intermediate_size": 7 * width // 2, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 8}
    config = MixtralConfig(vocab_size=VOCABULARY, dtype=torch.bfloat16, **heads, **sizes)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = MixtralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="500MB")
    stacks = [p for p in model.parameters() if p.ndim == 3]
    return sum(p.numel() for p in model.parameters()), max(p.numel() * p.element_size() for p in stacks)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "SMALL", "LARGE"), help="one measurement, for itself")
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure, options.tokens)
        return
    table = Table("base", "loading MiB", "left MiB", "step MiB", "step s", "loss", "in NF4", "bits each")
    with tempfile.TemporaryDirectory() as scratch:
        small, large = Path(scratch, "small"), Path(scratch, "large")
        write(small, 1, 64)
        parameters, largest = write(large, options.layers, options.width)
        size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
        for way in WAYS:
            command = [sys.executable, __file__, "--measure", way, str(small), str(large)]
            command += ["--tokens", str(options.tokens)]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            loading, left, peak, seconds, loss, weights, bits = map(float, done.stdout.split())
            memory = (f"{count / MIB:,.0f}" for count in (loading, left, peak))
            table.add_row(way, *memory, f"{seconds:.1f}", f"{loss:.4f}", f"{weights:,.0f}", f"{bits:.3f}")
    console = Console(width=120)
    console.print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{parameters:,} parameters, {size / MIB:,.0f} MiB in bfloat16, largest stack {largest / MIB:.0f} MiB; "
        f"{options.tokens} tokens, {torch.get_num_threads()} threads"
    )
    console.print(table)


if __name__ == "__main__":
    main()
