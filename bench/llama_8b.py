"""How fast and how small is LoRA, and QLoRA, on a model of Llama-3.1-8B's shape on a GPU, beside PEFT and bitsandbytes?

    .venv/bin/python bench/llama_8b.py [--rounds 2] [--steps 10] [--batch 1] [--sequence 2048]

LoRA of rank 16 in float32 on all linears of a random model in bfloat16, every block recomputed in backward, AdamW.
QLoRA is the same on NF4 in blocks of 64 with double quantization. PEFT runs as its users run it: transformers' own
checkpointing, `prepare_model_for_kbit_training`, bitsandbytes' `Linear4bit`. Each run is a process of its own, in
turns; the first steps warm up. Memory is what the allocator held at most while training, the model's building left out.
Prints losses (the same numbers on both sides), tokens a second, GiB and their ratios, and first what was chosen of
Veneer's kernels for a low-rank pair. Without a GPU it takes a tiny
model, which shows that the script runs and nothing else: the memory is then that of the process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from process_memory import forget_peak, status
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer.ops import kernels

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPE = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, WARM = 16, 3
KINDS = ("LoRA", "QLoRA")
SIDES = ("veneer", "peft")


def base() -> Any:
    """The same random model each time."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM(LlamaConfig(**(SHAPE if CUDA else TINY), dtype=torch.bfloat16)).bfloat16()


def ours(kind: str) -> tuple[Any, list[nn.Parameter]]:
    """Veneer's: NF4, recomputation and loss in chunks are its own."""
    model = base()
    if kind == "QLoRA":
        veneer.quantize(model, veneer.NF4(block_size=64, double_quant=True))
    adapter = veneer.attach(model, veneer.LoRA(rank=RANK, alpha=float(RANK)))
    veneer.checkpoint_activations(model)
    veneer.chunk_loss(model)
    return model, list(adapter.parameters())


def theirs(kind: str) -> tuple[Any, list[nn.Parameter]]:
    """PEFT's, as its guide has it."""
    import peft

    model = base()
    if kind == "QLoRA":
        _into_bitsandbytes(model)
        model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=SEVEN))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # as ours are
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def _into_bitsandbytes(model: Any) -> None:
    """Every linear of the blocks as bitsandbytes' Linear4bit, one at a time."""
    import bitsandbytes

    options = {"quant_type": "nf4", "compress_statistics": True}
    for path, module in list(model.model.named_modules(prefix="model")):
        if isinstance(module, nn.Linear):
            four = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, **options
            )
            four.support_avx512bf16_for_cpu = False
            four.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, **options)
            model.set_submodule(path, four.to(DEVICE))
    model.is_loaded_in_4bit = True


def measure(side: str, kind: str, steps: int, batch: int, sequence: int) -> dict[str, float]:
    """One run: its first and last loss, tokens a second, and the most memory."""
    model, trained = {"veneer": ours, "peft": theirs}[side](kind)
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    vocabulary = (SHAPE if CUDA else TINY)["vocab_size"]
    ids = torch.randint(vocabulary, (batch, sequence), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    losses, seconds = [], []
    _forget()
    for _ in range(WARM + steps):
        start = _now()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(_now() - start)
        losses.append(loss.item())
    speed = batch * sequence / statistics.median(seconds[WARM:])
    return {"first": losses[0], "last": losses[-1], "speed": speed, "gib": _peak() / 2**30}


def _now() -> float:
    if CUDA:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _forget() -> None:
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if CUDA else status()


def main() -> None:
    """All runs in turns, or with --one a single one, which prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2 if CUDA else 1)
    parser.add_argument("--steps", type=int, default=10 if CUDA else 3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=2048 if CUDA else 64)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        found = measure(*options.one, options.steps, options.batch, options.sequence)
        print(*kernels.choices(), sep="\n", file=sys.stderr)
        print(json.dumps(found))
        return
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    sizes = [f"--{name}={vars(options)[name]}" for name in ("steps", "batch", "sequence")]
    for _ in range(options.rounds):
        for kind in KINDS:
            for side in SIDES:
                command = [sys.executable, __file__, "--one", side, kind, *sizes]
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found.setdefault((side, kind), []).append(json.loads(printed.splitlines()[-1]))
    show(found, options)


def show(found: dict[tuple[str, str], list[dict[str, float]]], options: argparse.Namespace) -> None:
    """Medians over the rounds, and the ratios."""
    console = Console(width=140)
    name = torch.cuda.get_device_name() if CUDA else f"no GPU, a tiny model on {platform.machine()}"
    console.print(
        f"{name}; torch {torch.__version__}; {options.batch} x {options.sequence} tokens, {options.steps} steps"
    )
    table = Table("", "first loss", "last loss", "tokens a second", "GiB", "of PEFT's speed", "of PEFT's memory")
    middle = {
        key: {what: statistics.median(run[what] for run in runs) for what in runs[0]} for key, runs in found.items()
    }
    for kind in KINDS:
        own, peer = middle["veneer", kind], middle["peft", kind]
        for side, run in (("veneer", own), ("peft", peer)):
            ratios = (f"{own['speed'] / peer['speed']:.2f}", f"{own['gib'] / peer['gib']:.2f}") if run is own else ()
            figures = f"{run['first']:.3f}", f"{run['last']:.3f}", f"{run['speed']:,.0f}", f"{run['gib']:.2f}"
            table.add_row(f"{kind}, {side}", *figures, *ratios)
    console.print(table)


if __name__ == "__main__":
    main()
