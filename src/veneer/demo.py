"""The demo: a small language model learns, within minutes, to turn King James verses into modern English.

One run shows what the library is for. A frozen SmolLM2 is measured on verses it never trains on, a LoRA adapter is
trained beside it, the same is measured again, and the adapter is saved, merged and reloaded. All that is claimed on the
screen is in `report.json`, which is written last.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pydantic
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import veneer
from veneer.samples import smollm2, verses, whole
from veneer.samples.smollm2 import Chat
from veneer.train import Example, History, Recipe, encode, fit
from veneer.train.curve import draw
from veneer.train.judge import Judge, Judgement
from veneer.train.machine import device, fitted_to_machine, peak_bytes, versions

SYSTEM = "Rewrite in modern English."
WORDS = 20
"""The longest King James verse that takes part: a third of all are as short, and a minute goes further on them."""
NEW_TOKENS = 48
SHOWN = 3
COMPARED = 16
METHOD = veneer.LoRA(rank=8, alpha=16.0)


@dataclass(frozen=True)
class Size:
    """How much is trained, how many held-out verses judge it, and after which steps their loss is measured."""

    steps: int
    held_out: int
    probe_at: tuple[int, ...]
    batch_size: int = 8
    learning_rate: float = 3e-3

    @property
    def examples(self) -> int:
        """How many training verses are needed to see each of them once."""
        return self.steps * self.batch_size


FULL = Size(steps=90, held_out=100, probe_at=(30, 60))
QUICK = Size(steps=24, held_out=24, probe_at=(12,))


class Rewriting(pydantic.BaseModel, frozen=True):
    """One held-out verse, and what the model made of it."""

    reference: str
    source: str
    target: str
    before: str
    after: str


class Merged(pydantic.BaseModel, frozen=True):
    """How the merged model compares with the adapted one, and its reloaded copy with it."""

    merged_max_abs_logit_diff: float
    merged_same_top_token: float
    merged_texts_equal_adapted: int
    reloaded_texts_equal_merged: int


class Report(Merged, frozen=True):
    """All that the demo measured; `report.json` holds this."""

    held_out_loss_before: float
    held_out_loss_after: float
    held_out_loss_fall: float
    chrf_before: float
    chrf_after: float
    chrf_of_copying: float
    trainable: int
    total: int
    peak_bytes: int
    tokens_per_second: float
    adapter_bytes: int
    train_verses: int
    held_out_verses: int
    dropped_verses: int
    steps: int
    batch_size: int
    learning_rate: float
    method: str
    seed: int
    device: str
    threads: int
    versions: dict[str, str]
    seconds: dict[str, float]
    training_loss: list[tuple[int, float]]
    held_out_loss: list[tuple[int, float]]
    examples: list[Rewriting]


def run_demo(output: Path = Path("runs/demo"), quick: bool = False, seed: int = 0, json: bool = False) -> Report:
    """Trains and measures, and leaves `adapter/`, `merged/`, `loss.png` and `report.json` in `output`.

    With `json` the report goes to standard output, and everything for people to standard error. Raises MissingSample
    where a sample package is not installed.
    """
    console = Console(stderr=json, highlight=False)
    with fitted_to_machine() as threads:
        report = _run(Path(output), QUICK if quick else FULL, seed, threads, Clock(console))
    text = report.model_dump_json(indent=2)
    whole.replace(Path(output) / "report.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    show_table(report, console)
    console.print(f"In {output}: adapter/, merged/, loss.png and report.json", soft_wrap=True)
    if json:
        print(text)
    return report


class Clock:
    """Says which phase begins, and keeps how long each one took."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        """One phase, timed."""
        self.console.print(f"{title} ...", style="dim", soft_wrap=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)

    def total(self) -> dict[str, float]:
        """The seconds of all phases, and of the run."""
        return self.seconds | {"total": round(time.perf_counter() - self.start, 2)}


def _run(output: Path, size: Size, seed: int, threads: int, clock: Clock) -> Report:
    with clock.phase("load", "Loading SmolLM2-135M-Instruct and the verses; the first run converts the model"):
        chat = smollm2.load(smollm2.folder(), device())
        split = verses.split(seed)
        held_out, train = choose(split.held_out, size.held_out, seed), choose(split.train, size.examples, seed)
        judge = Judge(chat, [example(verse) for verse in held_out], NEW_TOKENS)
    with clock.phase("before", f"Measuring the base model on {len(held_out)} held-out verses"):
        before = judge(chat.model)
    show(clock.console, "Before training", held_out, before)
    with clock.phase("train", f"Training {type(METHOD).__name__} of rank {METHOD.rank} on {len(train)} verses"):
        adapter, history = _train(chat, train, judge, size, seed, clock.console)
    count = veneer.count_parameters(chat.model)
    with clock.phase("after", "Measuring the adapted model on the same verses"):
        after = judge(chat.model)
    show(clock.console, "After training", held_out, after)
    history.held_out = [(0, before.loss), *history.held_out, (size.steps, after.loss)]
    with clock.phase("save", "Saving the adapter and the loss curve, merging, and reloading the merged model"):
        whole.replace(output / "adapter", lambda folder: veneer.save(adapter, folder))
        whole.replace(output / "loss.png", lambda path: draw(history, path))
        merged = _merge(chat, adapter, judge, output / "merged")
    return Report(
        **merged.model_dump(),
        held_out_loss_before=before.loss,
        held_out_loss_after=after.loss,
        held_out_loss_fall=1 - after.loss / before.loss,
        chrf_before=before.chrf,
        chrf_after=after.chrf,
        chrf_of_copying=judge.copying(),
        trainable=count.trainable,
        total=count.total,
        peak_bytes=peak_bytes(chat.model.device),
        tokens_per_second=history.tokens_per_second,
        adapter_bytes=sum(file.stat().st_size for file in (output / "adapter").iterdir()),
        train_verses=len(train),
        held_out_verses=len(held_out),
        dropped_verses=split.dropped,
        steps=size.steps,
        batch_size=size.batch_size,
        learning_rate=size.learning_rate,
        method=str(METHOD),
        seed=seed,
        device=str(chat.model.device),
        threads=threads,
        versions=versions(),
        seconds=clock.total(),
        training_loss=history.training,
        held_out_loss=history.held_out,
        examples=_rewritings(held_out, before, after),
    )


def choose(among: Sequence[verses.Verse], count: int, seed: int) -> list[verses.Verse]:
    """`count` short verses, chosen by the seed."""
    short = [verse for verse in among if len(verse.source.split()) <= WORDS]
    return random.Random(seed).sample(short, min(count, len(short)))


def example(verse: verses.Verse) -> Example:
    """A verse as a turn of a chat."""
    return Example(verse.source, verse.target, SYSTEM)


def _train(
    chat: Chat, train: Sequence[verses.Verse], judge: Judge, size: Size, seed: int, console: Console
) -> tuple[veneer.Adapter, History]:
    torch.manual_seed(seed)
    adapter = veneer.attach(chat.model, METHOD)
    rows = [encode(chat.tokenizer, example(verse)) for verse in train]
    recipe = Recipe(size.steps, size.batch_size, size.learning_rate, seed=seed)
    probe = partial(judge.loss, chat.model)
    history = fit(
        chat.model, adapter, rows, judge.collator, recipe, console=console, probe=probe, probe_at=size.probe_at
    )
    return adapter, history


def _merge(chat: Chat, adapter: veneer.Adapter, judge: Judge, folder: Path) -> Merged:
    """Merges for good, saves the plain model, loads it with transformers alone, and compares what the three write."""
    model = chat.model
    logits, adapted = judge.logits(model, COMPARED), judge.answers(model, SHOWN)
    veneer.merge(model, adapter, permanent=True)
    moved, merged = judge.logits(model, COMPARED), judge.answers(model, SHOWN)
    whole.replace(folder, partial(smollm2.save, chat))
    reloaded = judge.answers(smollm2.load(folder, model.device).model, SHOWN)
    return Merged(
        merged_max_abs_logit_diff=float((moved - logits).abs().max()),
        merged_same_top_token=float((moved.argmax(-1) == logits.argmax(-1)).float().mean()),
        merged_texts_equal_adapted=_equal(merged, adapted),
        reloaded_texts_equal_merged=_equal(reloaded, merged),
    )


def _equal(one: Sequence[str], other: Sequence[str]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=True))


def _rewritings(held_out: Sequence[verses.Verse], before: Judgement, after: Judgement) -> list[Rewriting]:
    rows = zip(held_out[:SHOWN], before.answers, after.answers, strict=False)
    return [
        Rewriting(reference=v.reference, source=v.source, target=v.target, before=first, after=then)
        for v, first, then in rows
    ]


def show(console: Console, title: str, held_out: Sequence[verses.Verse], judgement: Judgement) -> None:
    """Loss, chrF and the first few verses, as the King James has them and as the model rewrites them."""
    console.print(f"\n[bold]{title}[/bold]: held-out loss {judgement.loss:.3f}, chrF {judgement.chrf:.1f}")
    for verse, answer in zip(held_out[:SHOWN], judgement.answers, strict=False):
        console.print(f"  [cyan]{verse.reference}[/cyan]", Text(verse.source))
        console.print("  ->", Text(answer or "(nothing)", style="green"))
    console.print()


def show_table(report: Report, console: Console) -> None:
    """The figures at the end."""
    n, table = len(report.examples), Table(show_header=False)
    for row in (
        ("held-out loss", f"{report.held_out_loss_before:.3f} -> {report.held_out_loss_after:.3f}"),
        ("chrF", f"{report.chrf_before:.1f} -> {report.chrf_after:.1f} (copying: {report.chrf_of_copying:.1f})"),
        ("trainable parameters", f"{report.trainable:,} of {report.total:,} ({report.trainable / report.total:.2%})"),
        ("adapter on disk", f"{report.adapter_bytes / 1e6:.1f} MB"),
        ("peak memory", f"{report.peak_bytes / 2**30:.2f} GiB"),
        ("training speed", f"{report.tokens_per_second:,.0f} tokens/s"),
        ("merged against adapted", f"logits within {report.merged_max_abs_logit_diff:.2g}, "
         f"{report.merged_texts_equal_adapted} of {n} texts equal"),
        ("reloaded against merged", f"{report.reloaded_texts_equal_merged} of {n} texts equal"),
        ("time", f"{report.seconds['total']:.0f} s, of which training {report.seconds['train']:.0f} s"),
    ):  # fmt: skip
        table.add_row(*row)
    console.print(table)
