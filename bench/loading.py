"""How much memory does loading in four bits take? Veneer beside transformers with bitsandbytes, from one folder.

    .venv/bin/python bench/loading.py [--full]

A Llama with random weights is written in bfloat16, in shards of 500 MB, and loaded by each in a process of its own.
Prints the greatest resident memory above what the libraries take, and what is left afterwards: pages of the process's
own, and pages of the mapped files, which the kernel may take back where memory is short. The Llama has four blocks of
width 2,048, with --full twelve.
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
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import veneer

MIB = 2**20
WAYS = ("veneer", "bitsandbytes")


def load(way: str, folder: str) -> torch.nn.Module:
    if way == "veneer":
        return veneer.load_quantized(folder, veneer.NF4())
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return LlamaForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu", quantization_config=config)


def measure(way: str, small: str, large: str) -> None:
    """In a process of its own: bytes at the peak, own and mapped ones afterwards, seconds."""
    warnings.simplefilter("ignore")
    load(way, small)  # what the libraries take, imports included
    forget_peak()
    before, start = {key: status(key) for key in ("VmRSS", "RssAnon", "RssFile")}, time.perf_counter()
    model = load(way, large)
    print(status("VmHWM") - before["VmRSS"], *(status(k) - before[k] for k in ("RssAnon", "RssFile")))
    print(time.perf_counter() - start)
    del model


def write(folder: Path, layers: int, width: int) -> int:
    """A random Llama; returns the bytes of its largest tensor."""
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=8000, num_attention_heads=16, dtype=torch.bfloat16, **sizes)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="500MB")
    return max(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="twelve blocks")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "SMALL", "LARGE"), help="one measurement, for itself")
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    table = Table("loaded by", "peak MiB", "own after", "mapped after", "peak / file", "seconds")
    with tempfile.TemporaryDirectory() as scratch:
        small, large = Path(scratch, "small"), Path(scratch, "large")
        write(small, 1, 64)
        largest = write(large, 12 if options.full else 4, options.width)
        size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
        for way in WAYS:
            command = [sys.executable, __file__, "--measure", way, str(small), str(large)]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            peak, own, mapped, seconds = map(float, done.stdout.split())
            memory = (f"{count / MIB:,.0f}" for count in (peak, own, mapped))
            table.add_row(way, *memory, f"{peak / size:.2f}", f"{seconds:.1f}")
    console = Console(width=100)
    console.print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{size / MIB:,.0f} MiB in bfloat16, largest tensor {largest / MIB:.0f} MiB"
    )
    console.print(table)


if __name__ == "__main__":
    main()
