"""Does a 4-bit base learn as well, and what does merging into it cost? LoRA and QLoRA on SmolLM2 and the verses.

    .venv/bin/python bench/qlora_verses.py [--full] [--out results.json]

The same LoRA is trained on the bfloat16 model and on the same model in NF4, on the same batches: in blocks of 64 as
QLoRA has it, and of 32; started at zero, and as LoftQ starts it, from what quantizing took. Then the plain QLoRA
adapter is merged: in bfloat16 with the sum kept dense and rounded to NF4 again, in float32 kept dense. Each is compared
with the unmerged model on the answers to held-out verses. SmolLM2 has weights on a 4-bit grid to begin with: this
checks that training works on NF4, not how good NF4 is. The first two bases, four steps and four verses; with --full all
bases, 60 steps and 100 verses.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import veneer
from veneer import drift
from veneer.demo import METHOD, NEW_TOKENS, choose, example
from veneer.samples import smollm2, verses
from veneer.samples.smollm2 import Chat
from veneer.train import Recipe, encode, fit
from veneer.train.judge import Judge
from veneer.train.machine import fitted_to_machine, versions

BATCH, SEED, RATE = 8, 0, 3e-3
BASES = (
    ("LoRA, bfloat16", None, False),
    ("QLoRA, NF4", veneer.NF4(), False),
    ("QLoRA, NF4, LoftQ", veneer.NF4(), True),
    ("QLoRA, NF4 in blocks of 32, LoftQ", veneer.NF4(block_size=32), True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all bases, 60 steps, 100 held-out verses")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    console = Console()
    with fitted_to_machine(), tempfile.TemporaryDirectory() as scratch:
        found = compare(options.full, Path(scratch), console)
    if options.out:
        options.out.write_text(json.dumps(found | {"versions": versions()}, indent=2) + "\n")


def compare(full: bool, scratch: Path, console: Console) -> dict[str, Any]:
    steps, judged = (60, 100) if full else (4, 4)
    training: dict[str, dict[str, float]] = {}
    for name, quantizer, start_near in BASES if full else BASES[:2]:
        chat = load(torch.bfloat16)
        judge = held_out(chat, judged)
        torch.manual_seed(SEED)
        if quantizer is not None and start_near:
            adapter, repair = veneer.quantize_around(chat.model, quantizer, replace(METHOD, init="loftq"))
            console.print(str(repair))
        else:
            if quantizer is not None:
                veneer.quantize(chat.model, quantizer)
            adapter = veneer.attach(chat.model, METHOD)
        before = judge.loss(chat.model)
        start = time.perf_counter()
        train(chat, adapter, judge, steps, console)
        seconds = time.perf_counter() - start
        training[name] = {"before": before, "after": judge.loss(chat.model), "seconds a step": seconds / steps}
        training[name]["base bytes"] = base_bytes(chat.model)
        veneer.save(adapter, scratch / name)
    table = Table("", "held-out loss before", "after", "seconds a step", "base MB", title=f"{steps} steps of {BATCH}")
    for name, row in training.items():
        size = f"{row['base bytes'] / 1e6:.1f}"
        table.add_row(name, f"{row['before']:.4f}", f"{row['after']:.4f}", f"{row['seconds a step']:.2f}", size)
    console.print(table)
    plain = training[BASES[0][0]]["after"]
    for name, row in training.items():
        console.print(f"{name}: {row['after'] / plain - 1:+.2%} from LoRA's loss")
    merging = {
        title: merge(scratch / "QLoRA, NF4", judged, dtype, requantize)
        for title, dtype, requantize in (
            ("bfloat16, kept dense", torch.bfloat16, False),
            ("bfloat16, NF4 again", torch.bfloat16, True),
            ("float32, kept dense", torch.float32, False),
        )
    }
    table = Table("merged", "max |Δ logit|", "mean", "KL", "same token", f"same answers of {judged}")
    for title, row in merging.items():
        figures = [f"{row[key]:.3g}" for key in ("largest", "mean", "divergence")]
        table.add_row(title, *figures, f"{row['same_top']:.2%}", f"{row['same_answers']}")
    console.print(table)
    return {"steps": steps, "training": training, "merging": merging}


def load(dtype: torch.dtype) -> Chat:
    return smollm2.load(smollm2.folder(), dtype=dtype)


def held_out(chat: Chat, count: int) -> Judge:
    split = verses.split(SEED)
    return Judge(chat, [example(verse) for verse in choose(split.held_out, count, SEED)], NEW_TOKENS)


def train(chat: Chat, adapter: veneer.Adapter, judge: Judge, steps: int, console: Console) -> None:
    rows = [encode(chat.tokenizer, example(v)) for v in choose(verses.split(SEED).train, steps * BATCH, SEED)]
    fit(chat.model, adapter, rows, judge.collator, Recipe(steps, BATCH, RATE, seed=SEED), console=console)


def merge(folder: Path, judged: int, dtype: torch.dtype, requantize: bool) -> dict[str, Any]:
    """What merging changes in the logits of all held-out answers, and in what is written greedily."""
    chat = load(dtype)
    veneer.quantize(chat.model, veneer.NF4())
    judge = held_out(chat, judged)
    adapter = veneer.load(chat.model, folder)
    logits, answers = judge.logits(chat.model, judged), judge.answers(chat.model, judged)
    veneer.merge(chat.model, adapter, requantize=requantize)
    moved = drift.between(logits, judge.logits(chat.model, judged))
    same = sum(a == b for a, b in zip(answers, judge.answers(chat.model, judged), strict=True))
    return asdict(moved) | {"same_answers": same}


def base_bytes(model: torch.nn.Module) -> int:
    """Bytes of all that is stored but the adapter."""
    state = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if ".adapters." not in key}
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in state.values()}.values())


if __name__ == "__main__":
    main()
