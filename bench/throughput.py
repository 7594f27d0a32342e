"""How many tokens a second does training take: a recipe of Veneer's beside TRL's SFTTrainer with PEFT?

    .venv/bin/python bench/throughput.py [--full] [--examples 24] [--batch 8] [--rounds 1] [--ways ...]

LoRA of rank 8 on all linears of SmolLM2-135M in bfloat16, adapters in float32, the same verses as chats, answers
learned only, batches of like length, no recomputing. TRL has its own loss in chunks and autocast, its default. Each
way trains on the examples for two epochs: in the first threads, caches and graphs warm up, the second is measured. A
figure is the tokens of all examples, without padding, over the seconds of that epoch's steps; CPU seconds are the
processor's, which other work on the machine disturbs less. Ways take turns in one process, and ratios are those of each
turn. The floor is the frozen model forward and back, with the loss in chunks, on the same examples and nothing else.

The short measure is TRL, ours and the floor, once. --full measures the other ways too (no autocast, packed rows
of 512 tokens, the loss whole, blocks compiled), on more examples and in more rounds. Needs `trl` and `peft`, and a C++
compiler for the compiled way.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from transformers import trainer as trainer_module
from transformers.trainer_pt_utils import get_length_grouped_indices

import veneer
from veneer.demo import example
from veneer.samples import smollm2, verses
from veneer.seams.quiet import quiet
from veneer.train.data.collate import Tokens
from veneer.train.machine import fitted_to_machine, versions

SEED, RATE, LENGTH = 0, 1e-3, 512
PEER, OURS, FLOOR = "TRL + PEFT", "Veneer", "frozen model"
SHORT = (PEER, OURS, FLOOR)
FULL = (
    PEER,
    f"{PEER}, no autocast",
    f"{PEER}, packed",
    OURS,
    "Veneer, whole loss",
    "Veneer, packed",
    "Veneer, compiled",
    FLOOR,
)
Clock = tuple[float, float]


@dataclass
class Run:
    """One way in one round: tokens a second by the clock and of the processor, and what was said of it."""

    wall: float
    cpu: float
    note: str = ""


class Ticks(TrainerCallback):
    """When each optimizer step of a Trainer ended; transformers makes one for every Trainer, TRL's too."""

    ends: list[Clock] = []  # noqa: RUF012 (all Trainers write into one)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(now())


def now() -> Clock:
    return time.perf_counter(), time.process_time()


def chats(count: int) -> list[dict[str, Any]]:
    found = []
    for verse in verses.split(SEED).train[:count]:
        one = example(verse)
        said = [("system", one.system), ("user", one.prompt), ("assistant", one.answer)]
        found.append({"messages": [{"role": role, "content": text} for role, text in said]})
    return found


def recipe(way: str, rows: list[dict[str, Any]], batch: int) -> str:
    packed = {"packing": True, "max_length": LENGTH} if "packed" in way else {}
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/chats.jsonl"
        with open(data, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        training = {
            "epochs": 2,
            "batch_size": batch if not packed else packed_rows(rows, batch),
            "learning_rate": RATE,
            "loss": "whole" if "whole" in way else "auto",
            "compile": "compiled" in way,
            "checkpoint_every": 10**6,
            "trackers": [],
        }
        done = veneer.train(
            {
                "model": "sample:smollm2",
                "method": {"LoRA": {"rank": 8, "alpha": 16.0}},
                "data": {"path": data, "held_out": 0, **packed},
                "training": training,
                "output": f"{folder}/out",
            },
            console=Console(file=io.StringIO()),
        )
    return "" if done.report["compiled"] is None else graphs(done.report)


def graphs(report: dict[str, Any]) -> str:
    """How many were made, in which steps, and how long those took: the steps after the first epoch are measured."""
    made = report["compiled"]
    seconds = sum(report["step_seconds"][step - 1] for step in made["at_steps"])
    late = [step for step in made["at_steps"] if step > report["steps"] // 2]
    return f"{made['graphs']} graphs in steps {made['at_steps']} of {seconds:.0f} s" + (" (measured!)" if late else "")


def packed_rows(rows: Sequence[Any], batch: int) -> int:
    """Packed rows that hold about as many tokens as a batch of examples."""
    return max(1, round(batch * statistics.mean(lengths(rows)) / LENGTH))


def lengths(rows: Sequence[dict[str, Any]]) -> list[int]:
    tokenizer = smollm2.load(smollm2.folder()).tokenizer
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    return [len(tokenizer(text)["input_ids"]) for text in texts]


def trl(way: str, rows: list[dict[str, Any]], batch: int) -> str:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    chat = smollm2.load(smollm2.folder())
    packed = "packed" in way
    halves = [{"prompt": row["messages"][:2], "completion": row["messages"][2:]} for row in rows]
    with tempfile.TemporaryDirectory() as folder, quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = SFTConfig(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=packed_rows(rows, batch) if packed else batch,
            learning_rate=RATE,
            max_length=LENGTH,
            packing=packed,
            completion_only_loss=True,
            train_sampling_strategy="random" if packed else "group_by_length",
            bf16="no autocast" not in way,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            chat.model,
            arguments,
            train_dataset=Dataset.from_list(halves),
            processing_class=chat.tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )
        trainer.remove_callback(trainer_module.PrinterCallback)
        trainer.train()
    return ""


def frozen(way: str, rows: list[dict[str, Any]], batch: int) -> str:
    """The frozen model forward and back, on batches of like length, as ours and TRL's are."""
    chat = smollm2.load(smollm2.folder())
    model, tokenizer = chat.model.requires_grad_(False).train(), chat.tokenizer
    encoded = []
    for row in rows:
        both, asked = (
            tokenizer(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=more))["input_ids"]
            for part, more in ((row["messages"], False), (row["messages"][:2], True))
        )
        encoded.append({"input_ids": both, "labels": [-100] * len(asked) + both[len(asked) :]})
    order = get_length_grouped_indices([len(row["input_ids"]) for row in encoded], batch)
    batches = [[encoded[row] for row in order[start : start + batch]] for start in range(0, len(order), batch)]
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    with veneer.chunk_loss(model):
        for each in batches * 2:
            model(**Tokens(tokenizer.pad_token_id)(each), use_cache=False).loss.backward()
            Ticks.ends.append(now())
    hook.remove()
    return ""


def measure(way: str, rows: list[dict[str, Any]], batch: int, tokens: int) -> Run:
    Ticks.ends.clear()
    run: Callable[..., str] = frozen if way == FLOOR else trl if way.startswith(PEER) else recipe
    with fitted_to_machine():
        note = run(way, rows, batch)
    middle = len(Ticks.ends) // 2 - 1
    wall, cpu = (last - first for first, last in zip(Ticks.ends[middle], Ticks.ends[-1], strict=True))
    return Run(tokens / wall, tokens / cpu, note)


def table(found: dict[str, list[Run]]) -> Table:
    shown = Table("", "tokens/s", "of TRL + PEFT", "tokens a CPU second", "of TRL + PEFT", "of the frozen model", "")
    for way, runs in found.items():
        cells = [f"{statistics.median(run.wall for run in runs):.0f}", against(found, way, PEER, "wall")]
        cells += [f"{statistics.median(run.cpu for run in runs):.0f}", against(found, way, PEER, "cpu")]
        shown.add_row(way, *cells, against(found, way, FLOOR, "cpu"), runs[0].note)
    return shown


def against(found: dict[str, list[Run]], way: str, other: str, kind: str) -> str:
    """The median of the rounds' ratios, and their span."""
    if way == other or other not in found:
        return ""
    ratios = [getattr(a, kind) / getattr(b, kind) for a, b in zip(found[way], found[other], strict=False)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all ways, 96 examples, five rounds")
    parser.add_argument("--examples", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--ways", nargs="+", choices=FULL, help="which to measure")
    asked = parser.parse_args()
    ways = asked.ways or (FULL if asked.full else SHORT)
    examples = asked.examples or (96 if asked.full else 24)
    trainer_module.DEFAULT_CALLBACKS.append(Ticks)
    rows = chats(examples)
    tokens = sum(lengths(rows))
    found: dict[str, list[Run]] = {way: [] for way in ways}
    for _ in range(asked.rounds or (5 if asked.full else 1)):
        for way in ways:
            found[way].append(measure(way, rows, asked.batch, tokens))
            print(way, found[way][-1], file=sys.stderr, flush=True)
    console = Console(width=170)
    console.print(f"{tokens} tokens of {examples} examples, {asked.batch} a step; {torch.get_num_threads()} thread(s)")
    console.print(f"torch {torch.__version__}, {versions()}")
    console.print(table(found))


if __name__ == "__main__":
    main()
