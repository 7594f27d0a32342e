"""How many tokens a second does training take: a recipe of Veneer's beside TRL's SFTTrainer with PEFT?

    .venv/bin/python bench/throughput.py [--examples 48] [--rounds 2]

LoRA of rank 8 on all linears of SmolLM2-135M in bfloat16, on the same verses as chats, answers learned only, batches of
8 examples (packed rows: two of 512 tokens, about as many tokens). Both as good as their settings get on this machine:
batches of like length, or packed rows; no recomputing; TRL with its own loss in chunks. Each runs in a process of its
own, one after the other, several times. A figure is the tokens of all examples, without padding, over the seconds of
one epoch's steps, of which the first is left out; CPU seconds are the processor's, which other work on the machine
disturbs less. Needs `trl` and `peft`. Prints a table; the figures of a named machine are kept in bench/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.optim.optimizer import register_optimizer_step_post_hook

import veneer
from veneer.demo import example
from veneer.samples import smollm2, verses
from veneer.train.machine import fitting_threads, versions

BATCH, SEED, RATE, LENGTH, ROWS = 8, 0, 1e-3, 512, 2
WAYS = ("TRL + PEFT", "TRL + PEFT, packed", "Veneer", "Veneer, whole loss", "Veneer, packed")


def chats(count: int) -> list[dict[str, Any]]:
    found = []
    for verse in verses.split(SEED).train[:count]:
        one = example(verse)
        said = [("system", one.system), ("user", one.prompt), ("assistant", one.answer)]
        found.append({"messages": [{"role": role, "content": text} for role, text in said]})
    return found


def recipe(way: str, folder: str, rows: list[dict[str, Any]]) -> None:
    data = f"{folder}/chats.jsonl"
    with open(data, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    packed = {"packing": True, "max_length": LENGTH} if "packed" in way else {}
    veneer.train(
        {
            "model": "sample:smollm2",
            "method": {"LoRA": {"rank": 8, "alpha": 16.0}},
            "data": {"path": data, **packed},
            "training": {
                "epochs": 1,
                "batch_size": ROWS if packed else BATCH,
                "learning_rate": RATE,
                "loss": "whole" if "whole" in way else "auto",
                "checkpoint_every": 10**6,
                "trackers": [],
            },
            "output": f"{folder}/out",
        }
    )


def trl(way: str, folder: str, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    chat = smollm2.load(smollm2.folder())
    packed = "packed" in way
    halves = [{"prompt": row["messages"][:2], "completion": row["messages"][2:]} for row in rows]
    arguments = SFTConfig(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=ROWS if packed else BATCH,
        learning_rate=RATE,
        max_length=LENGTH,
        packing=packed,
        completion_only_loss=True,
        train_sampling_strategy="random" if packed else "group_by_length",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    trainer = SFTTrainer(
        chat.model,
        arguments,
        train_dataset=Dataset.from_list(halves),
        processing_class=chat.tokenizer,
        peft_config=lora,
    )
    trainer.train()


def measure(way: str, count: int) -> dict[str, float]:
    rows = chats(count)
    chat = smollm2.load(smollm2.folder())
    texts = [chat.tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    tokens = sum(len(chat.tokenizer(text)["input_ids"]) for text in texts)
    ends: list[tuple[float, float]] = []
    register_optimizer_step_post_hook(lambda *_: ends.append((time.perf_counter(), time.process_time())))
    with fitting_threads(), tempfile.TemporaryDirectory() as folder:
        (trl if "TRL" in way else recipe)(way, folder, rows)
    measured = tokens * (len(ends) - 1) / len(ends)
    wall, cpu = (last - first for first, last in zip(ends[0], ends[-1], strict=True))
    return {"wall": measured / wall, "cpu": measured / cpu, "steps": len(ends), "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=WAYS, help="which to measure, of those in the table")
    parser.add_argument("--only", metavar="WAY", help="measure one, in this process")
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(measure(asked.only, asked.examples)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in asked.ways}
    for _ in range(asked.rounds):
        for way in asked.ways:
            command = [sys.executable, __file__, "--examples", str(asked.examples), "--only", way]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                sys.exit(f"{way}: {ran.stderr[-2000:]}")
            found[way].append(json.loads(ran.stdout.splitlines()[-1]))
            print(way, found[way][-1], file=sys.stderr, flush=True)
    table = Table("", "tokens/s", "of TRL", "tokens a CPU second", "of TRL", "steps")
    first = found[asked.ways[0]]
    for way, runs in found.items():
        cells = []
        for kind in ("wall", "cpu"):
            rates = [run[kind] for run in runs]
            ratios = [run[kind] / peer[kind] for run, peer in zip(runs, first, strict=True)]
            cells += [", ".join(f"{rate:.0f}" for rate in rates), f"{statistics.median(ratios):.2f}"]
        table.add_row(way, *cells, f"{runs[0]['steps']:.0f}")
    console = Console(width=120)
    console.print(
        f"{first[0]['tokens']:.0f} tokens of {asked.examples} examples; torch {torch.__version__}, {versions()}"
    )
    console.print(table)


if __name__ == "__main__":
    main()
