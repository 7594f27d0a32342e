"""Which method does best on a small real task? All of them on MiniLM and film reviews, against frozen features.

    .venv/bin/python bench/methods.py [--full] [--only LoRA DoRA] [--out FILE]

Every method starts from the same head, the best logistic regression on the frozen model, sees the same batches, and is
judged on the same held-out sentences; the gain is over that regression, sentence by sentence. Three runs start: at a
third of the learning rate below, at that rate, and at three times it. After a third of the steps the one with the
lowest loss on validation sentences, which are a part of the training ones, goes on to the end. Four methods take a few
steps and are judged on few sentences; with --full all take all. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from reviews import BATCH, HEAD, Run, Task
from torch import Tensor

import veneer
from veneer.train.machine import fitted_to_machine

STEPS, FEW_STEPS, HELD_OUT, FEW_HELD_OUT, LONGEST, PART_LR = 300, 24, 3000, 200, 24, 6e-3
FEW = ("LoRA", "IA3", "prefix tuning", "BitFit")
SUBLAYERS = "attention | mlp"
PROMPT = "is this sentence from a film review positive or negative in its opinion of the film, good or bad?"


@dataclass(frozen=True)
class Entry:
    """A method (None for the head alone), the learning rate it likes, and where it goes.

    Of a `fused` one two are trained first, each on half of the batches; the fusion over them is what counts.
    """

    method: Any
    lr: float
    where: str | None = None
    fused: bool = False


def entries(task: Task, steps: int) -> dict[str, Entry]:
    """Every method that trains something of its own for a classifier."""
    question = task.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    prefix = veneer.PrefixTuning(length=10)
    mam = {"attention": prefix, "mlp": veneer.BottleneckAdapter(width=48, placement="parallel", scaling=4.0)}
    return {
        "head alone": Entry(None, 1e-3),
        "LoRA": Entry(veneer.LoRA(rank=8), 2e-3),
        "LoRA, PiSSA": Entry(veneer.LoRA(rank=8, init="pissa"), 1e-3),
        "LoRA, gated": Entry(veneer.Gated(veneer.LoRA(rank=8)), 2e-3),
        "DoRA": Entry(veneer.DoRA(rank=8), 2e-3),
        "LoRA-FA": Entry(veneer.LoRAFA(rank=8), 5e-3),
        "AdaLoRA": Entry(veneer.AdaLoRA(total_steps=steps, initial_rank=12, target_rank=8, orthogonality=0.1), 1e-2),
        "VeRA": Entry(veneer.VeRA(rank=256), 3e-2),
        "LoHa": Entry(veneer.LoHa(rank=8), 2e-3),
        "HiRA": Entry(veneer.HiRA(rank=32), 5e-3),
        "MiSS": Entry(veneer.MiSS(rank=16), 2e-4),
        "SHiRA": Entry(veneer.SHiRA(rank=8, seed=0), 2e-3),
        "OFT": Entry(veneer.OFT(block_size=32), 2e-3),
        "IA3": Entry(veneer.IA3(), 2e-2),
        "prefix tuning": Entry(prefix, 2e-2),
        "prefix tuning, reparameterized": Entry(veneer.PrefixTuning(length=10, reparameterization=True), 2e-3),
        "prompt tuning": Entry(veneer.PromptTuning(length=20, init=question), 1e-1),
        "P-tuning": Entry(veneer.PTuning(length=5), 2e-3),
        "LLaMA-Adapter": Entry(veneer.LLaMAAdapter(length=10), 2e-2),
        "Houlsby": Entry(veneer.BottleneckAdapter.houlsby(width=64), 2e-3, SUBLAYERS),
        "Pfeiffer": Entry(veneer.BottleneckAdapter.pfeiffer(), 2e-3, "mlp"),
        "parallel adapter": Entry(veneer.BottleneckAdapter.parallel(), 1e-4, "mlp"),
        "parallel adapter, width 48": Entry(mam["mlp"], 2e-3, "mlp"),
        "Compacter": Entry(veneer.Compacter(), 3e-3, SUBLAYERS),
        "invertible adapter": Entry(veneer.InvertibleAdapter(), 5e-3, "embedding"),
        "AdapterFusion": Entry(veneer.BottleneckAdapter.pfeiffer(), 1e-3, "mlp", fused=True),
        "trainable tokens": Entry(veneer.TrainableTokens(tokens=task.frequent(500)), 1e-2),
        "BitFit": Entry(veneer.BitFit(), 1e-3, "bert"),
        "LayerNorm tuning": Entry(veneer.LayerNormTuning(), 5e-3),
        "MAM": Entry(mam, 2e-3),
        "full fine-tuning": Entry(veneer.FullFineTuning(), 5e-5, "bert"),
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--full", action="store_true", help=f"all methods, {STEPS} steps, {HELD_OUT} held-out sentences"
    )
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--out", type=Path, help="append the results there as lines of JSON")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with fitted_to_machine():
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """One row a method, printed when it is done."""
    steps, held_out = (STEPS, HELD_OUT) if options.full else (FEW_STEPS, FEW_HELD_OUT)
    task = Task(steps, held_out, LONGEST)
    frozen, before = task.judge(task.model(), task.held_out).right, task.judge(task.model(), task.validation).loss
    print(f"Frozen features: {_interval(frozen)} of {held_out} held-out sentences. {steps} steps of {BATCH}.")
    print(f"Validation loss {before:.3f} before; in the table after {steps // 3} steps, at lr/3, lr and 3 lr.\n")
    print("| method | accuracy | over frozen features | trainable | of all | CPU seconds | lr | validation losses |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    every = entries(task, steps)
    for name in options.only or (every if options.full else FEW):
        entry = every[name]
        runs = {lr: start(task, entry, lr).until(steps // 3) for lr in (entry.lr / 3, entry.lr, entry.lr * 3)}
        losses = {lr: task.judge(run.model, task.validation).loss for lr, run in runs.items()}
        lr = min(losses, key=losses.__getitem__)
        run = runs[lr].until(steps)
        right, counts = task.judge(run.model, task.held_out).right, veneer.count_parameters(run.model)
        gain = _interval(right.float() - frozen.float(), "+")
        row = (name, _interval(right), gain, f"{counts.trainable:,}", f"{counts.percentage:.2f}%", f"{run.seconds:.0f}")
        print(f"| {' | '.join(row)} | {lr:.2g} | {', '.join(f'{loss:.3f}' for loss in losses.values())} |", flush=True)
        if options.out:
            found = {"method": name, "lr": lr, "losses": losses, "row": row, "right": right.int().tolist()}
            with options.out.open("a") as file:
                file.write(json.dumps(found) + "\n")


def start(task: Task, entry: Entry, lr: float) -> Run:
    """A model with the method and the head, before the first step."""
    model = task.model()
    if entry.method is None:
        return Run(model, veneer.attach(model, veneer.FullFineTuning(), where="classifier"), lr, task.training)
    if entry.fused:
        return fused(task, model, entry, lr)
    return Run(model, veneer.attach(model, entry.method, entry.where, also_train=HEAD), lr, task.training)


def fused(task: Task, model: Any, entry: Entry, lr: float) -> Run:
    """A fusion over two adapters, each trained on half of the batches at the rate that won for one alone."""
    parts = []
    for half in range(2):
        part = veneer.attach(model, entry.method, entry.where, name=f"half-{half}")
        batches = task.training[half::2]
        Run(model, part, PART_LR, batches).until(len(batches))
        parts.append(part)
    fusion = veneer.fuse(model, parts, also_train=HEAD)
    for part in parts:
        veneer.detach(model, part)
    return Run(model, fusion, lr, task.training)


def _interval(values: Tensor, sign: str = "") -> str:
    """The mean with its 95% interval."""
    values = values.float()
    return f"{values.mean():{sign}.3f} ± {1.96 * values.std() / len(values) ** 0.5:.3f}"


if __name__ == "__main__":
    main()
