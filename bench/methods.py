"""Which method does best on a small real task? All of them on MiniLM and film reviews, against frozen features.

    .venv/bin/python bench/methods.py [--steps 80] [--only LoRA DoRA]

The baseline trains the classification head alone on the frozen model (`head`), and a logistic regression on its mean-
pooled features (`features`), whichever is better. Each method trains the same head beside its own parameters, with the
same batches. Prints a table; the figures of a named machine are kept in bench/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import veneer
from veneer.samples import minilm, sentiment
from veneer.train.machine import fitting_threads

STEPS, BATCH, HELD_OUT, SEED = 80, 32, 1000, 0
HEAD = ["classifier"]
SUBLAYERS = "attention | mlp"


@dataclass(frozen=True)
class Entry:
    """A method, where it goes, and the learning rate it likes."""

    method: Any
    where: str | None = None
    lr: float = 2e-3


METHODS: dict[str, Entry] = {
    "LoRA": Entry(veneer.LoRA(rank=8)),
    "LoRA, PiSSA": Entry(veneer.LoRA(rank=8, init="pissa"), lr=1e-3),
    "DoRA": Entry(veneer.DoRA(rank=8)),
    "LoRA-FA": Entry(veneer.LoRAFA(rank=8), lr=5e-3),
    "AdaLoRA": Entry(veneer.AdaLoRA(total_steps=STEPS, initial_rank=12, target_rank=8, orthogonality=0.1), lr=2e-2),
    "VeRA": Entry(veneer.VeRA(rank=256), lr=2e-2),
    "HiRA": Entry(veneer.HiRA(rank=32), lr=5e-3),
    "MiSS": Entry(veneer.MiSS(rank=16), lr=1e-3),
    "SHiRA": Entry(veneer.SHiRA(rank=8, seed=0), lr=2e-3),
    "OFT": Entry(veneer.OFT(block_size=32), lr=2e-3),
    "IA3": Entry(veneer.IA3(), lr=2e-2),
    "prefix tuning": Entry(veneer.PrefixTuning(length=30), lr=2e-2),
    "prefix tuning, reparameterized": Entry(veneer.PrefixTuning(length=30, reparameterization=True), lr=3e-4),
    "prompt tuning": Entry(veneer.PromptTuning(length=20), lr=2e-2),
    "P-tuning": Entry(veneer.PTuning(length=20), lr=5e-3),
    "Houlsby": Entry(veneer.BottleneckAdapter.houlsby(width=64), SUBLAYERS),
    "Pfeiffer": Entry(veneer.BottleneckAdapter.pfeiffer(), "mlp"),
    "parallel adapter": Entry(veneer.BottleneckAdapter.parallel(), "mlp", lr=3e-4),
    "Compacter": Entry(veneer.Compacter(), SUBLAYERS, lr=1e-2),
    "BitFit": Entry(veneer.BitFit(), "bert", lr=5e-3),
    "LayerNorm tuning": Entry(veneer.LayerNormTuning(), lr=5e-3),
    "MAM": Entry(
        {
            "attention": veneer.PrefixTuning(length=30),
            "mlp": veneer.BottleneckAdapter(width=48, placement="parallel", scaling=4.0),
        }
    ),
    "full fine-tuning": Entry(veneer.FullFineTuning(), "bert", lr=5e-5),
}


@dataclass(frozen=True)
class Result:
    """What one method came to."""

    method: str
    accuracy: float
    trainable: int
    percentage: float
    seconds: float


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with fitting_threads():
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Train the baselines and the methods, and print one table."""
    task = Task(options.steps)
    console = Console()
    results = [task.features(), task.run("head", None)]
    for name in options.only:
        results.append(task.run(name, METHODS[name]))
        console.print(f"{name}: {results[-1].accuracy:.3f} in {results[-1].seconds:.0f} s")
    console.print(_table(results, options.steps))
    if options.out:
        found = {"machine": platform.machine(), "torch": torch.__version__, "steps": options.steps}
        options.out.write_text(json.dumps({**found, "results": [asdict(r) for r in results]}, indent=2) + "\n")


class Task:
    """The sentences as batches, the same for all."""

    def __init__(self, steps: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(minilm.folder())
        training, held_out = sentiment.load(HELD_OUT, SEED)
        order = random.Random(SEED)
        batches = []
        while len(batches) < steps:  # sentences of like length together, so that little is padded
            chunk = sorted(order.sample(training, BATCH * 10), key=lambda s: len(s.text))
            batches += order.sample([chunk[i : i + BATCH] for i in range(0, len(chunk), BATCH)], 10)
        self.training = [self._batch(batch) for batch in batches[:steps]]
        held_out.sort(key=lambda s: len(s.text))
        self.held_out = [self._batch(held_out[i : i + 100]) for i in range(0, HELD_OUT, 100)]

    def _batch(self, sentences: list[sentiment.Sentence]) -> dict[str, Tensor]:
        texts = self.tokenizer([s.text for s in sentences], padding=True, truncation=True, return_tensors="pt")
        return {**texts, "labels": torch.tensor([int(s.positive) for s in sentences])}

    def model(self) -> torch.nn.Module:
        """MiniLM with a fresh head, the same each time."""
        torch.manual_seed(SEED)
        return AutoModelForSequenceClassification.from_pretrained(
            minilm.folder(), num_labels=2, dtype=torch.float32, local_files_only=True
        ).eval()

    def run(self, name: str, entry: Entry | None) -> Result:
        """One method beside the head, or the head alone."""
        model = self.model()
        if entry is None:
            adapter, lr = veneer.attach(model, veneer.FullFineTuning(), where="classifier"), 2e-3
        else:
            adapter, lr = veneer.attach(model, entry.method, entry.where, also_train=HEAD), entry.lr
        start = time.perf_counter()
        self._train(model, adapter, lr)
        seconds = time.perf_counter() - start
        counts = veneer.count_parameters(model)
        return Result(name, self._accuracy(lambda b: model(**b).logits), counts.trainable, counts.percentage, seconds)

    def _train(self, model: torch.nn.Module, adapter: veneer.Adapter, lr: float) -> None:
        torch.manual_seed(SEED)
        model.train()
        optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=lr), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(self.training), pct_start=0.1)
        for step, batch in enumerate(self.training, 1):
            loss = model(**batch).loss
            extra = adapter.regularization()
            (loss if extra is None else loss + extra).backward()
            torch.nn.utils.clip_grad_norm_(list(adapter.parameters()), 1.0)
            optimizer.step()
            schedule.step()
            adapter.after_step(step)
            optimizer.zero_grad()
        model.eval()

    @torch.no_grad()
    def _accuracy(self, answer: Callable[[dict[str, Tensor]], Tensor]) -> float:
        right = sum((answer(batch).argmax(-1) == batch["labels"]).sum().item() for batch in self.held_out)
        return right / HELD_OUT

    def features(self) -> Result:
        """Logistic regression on mean-pooled features of the frozen model."""
        model = self.model()
        start = time.perf_counter()
        pooled, labels = zip(*self._pooled(model, self.training), strict=True)
        x, y = torch.cat(pooled), torch.cat(labels)
        linear = torch.nn.Linear(x.shape[1], 2)
        optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=300)

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(linear(x), y) + 1e-4 * linear.weight.pow(2).sum()
            value.backward()
            return value

        optimizer.step(loss)
        seconds = time.perf_counter() - start
        accuracy = self._accuracy(lambda batch: linear(next(self._pooled(model, [batch]))[0]))
        count = sum(p.numel() for p in linear.parameters())
        total = sum(p.numel() for p in model.parameters())
        return Result("features", accuracy, count, 100 * count / total, seconds)

    @torch.no_grad()
    def _pooled(self, model: torch.nn.Module, batches: list[dict[str, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            states = model.base_model(**inputs).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            yield torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1) * 20, batch["labels"]


def _table(results: list[Result], steps: int) -> Table:
    table = Table(title=f"Film-review sentences, MiniLM, {steps} steps of {BATCH}; {HELD_OUT} held-out sentences")
    for heading in ("method", "accuracy", "trainable", "of all", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for r in sorted(results, key=lambda r: -r.accuracy):
        table.add_row(r.method, f"{r.accuracy:.3f}", f"{r.trainable:,}", f"{r.percentage:.2f}%", f"{r.seconds:.0f}")
    return table


if __name__ == "__main__":
    main()
