"""One run of a comparison: train by its recipe, then measure all that is compared, in a process of its own.

`python -m veneer.compare.cells` reads the files of cells from its standard input, a line each, runs each in a process
forked off before anything was loaded but modules, and answers with a line when it is over. So a cell's peak of memory
is its own, and the seconds that imports take are spent once. When its input ends, so does the cell at hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import select
import shutil
import signal
import sys
import traceback
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import veneer
from veneer.compare import forgetting, inference, predicting, scoring
from veneer.errors import Diverged, VeneerError
from veneer.samples import whole
from veneer.train import models
from veneer.train import recipe as recipes
from veneer.train.data import Prepared, prepare, recognize
from veneer.train.machine import device, fitted_to_machine, peak_bytes, versions
from veneer.train.progress import History
from veneer.train.recipe import Recipe
from veneer.train.run import train

VALIDATION = 256
"""Rows of the training data, at most a fifth of them, by whose loss a search chooses."""
MISTAKE = 2
"""The exit code of a cell that Veneer refused, and would refuse with any seed."""


def run(file: Path) -> None:
    """Run the cell that a file describes, and write `result.json` beside it.

    The description: `recipe`, `budget` (tokens, or nothing where the recipe names its steps), `share` of its steps to
    do, `validation` for a search on the training rows alone, `inference` whether speed is measured, `text` a file.
    """
    with (file.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what a comparison that was killed has left is about to end
        _run(json.loads(file.read_text(encoding="utf-8")), file)


def _run(told: dict[str, Any], file: Path) -> None:
    folder = file.parent
    shutil.rmtree(folder / "run", ignore_errors=True)  # of an earlier process that was killed
    recipe = recipes.read(json.dumps(told["recipe"] | {"output": str(folder / "run")}), str(file))
    with fitted_to_machine():
        _, task = recognize(recipe.data)
        tokenizer = models.processing(recipe.model, task)
        prepared = prepare(recipe.data, tokenizer, recipe.training.seed)
        if told["validation"]:
            prepared = within_training(prepared)
        recipe = _settled(recipe, prepared, told)
        start = _warm()
        result = train(recipe, prepared=prepared)
        found = _figures(result.report, result.recipe) | {"start_bytes": start, "task": prepared.task}
        adapter = folder / "run" / "adapter"
        found["adapter_bytes"] = sum(path.stat().st_size for path in adapter.glob("*.safetensors"))
        if not told["validation"]:
            found["predicted"] = predicting.parts(result, prepared, start)
            rows, batch = prepared.held_out, result.report["micro_batch_size"]
            found["examples"] = scoring.examples(result.model, tokenizer, rows, prepared, batch)
            found["forgetting"] = forgetting.measure(result.model, tokenizer, prepared.task, told["text"])
            if told["inference"]:
                found["inference"] = inference.measure(result, prepared)
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    text = json.dumps({"cell": told, **found}, ensure_ascii=False)
    whole.replace(folder / "result.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))


def _warm() -> int:
    """Bytes that the process, or the GPU, has once a step of a small layer has brought in what torch computes with.

    A forked process has none of its parent's pages of libraries until it touches them.
    """
    layer = nn.TransformerEncoderLayer(64, 4, batch_first=True, device=device())
    layer(torch.ones(4, 16, 64, device=device())).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    return peak_bytes(device())


def within_training(prepared: Prepared) -> Prepared:
    """Training and held-out rows for a search, both taken from the training rows; rows that are alike stay together."""
    ids = [repr(row) for row in prepared.train["input_ids"]]
    order = sorted(range(len(ids)), key=lambda row: blake2b(ids[row].encode(), digest_size=8).digest())
    count = max(1, min(VALIDATION, len(order) // 5))
    return replace(prepared, train=prepared.train.select(order[count:]), held_out=prepared.train.select(order[:count]))


def _settled(recipe: Recipe, prepared: Prepared, told: dict[str, Any]) -> Recipe:
    """The recipe with its steps: those of the budget, and of these the share that the cell does."""
    training = recipe.training
    if tokens := told["budget"].get("tokens"):
        lengths = prepared.train["length"]
        steps = round(tokens / (sum(lengths) / len(lengths) * training.batch_size))
    else:
        steps = training.steps or training.steps_over(len(prepared.train))
    steps = max(1, math.ceil(steps * told["share"]))
    every = recipe.evaluation.every or max(1, steps // 5)
    return recipe.model_copy(
        update={
            "training": training.model_copy(update={"steps": steps, "epochs": None, "checkpoint_every": steps}),
            "evaluation": recipe.evaluation.model_copy(update={"every": min(every, steps)}),
        }
    )


def _figures(report: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What a run's report says of its course."""
    seconds = report["step_seconds"]
    history = History.of(report["log"], report["before"].get("loss"))
    tokens = max((entry.get("num_input_tokens_seen", 0) for entry in report["log"]), default=0)
    settled = seconds[1:] or seconds  # the first step loads kernels and takes memory
    names = ("before", "metrics", "steps", "trainable", "total", "peak_bytes", "micro_batch_size", "seconds")
    return {name: report[name] for name in names} | {
        "learning_rate": recipe.learning_rate,
        "tokens": tokens,
        "step_seconds": median(settled),
        "training_seconds": sum(seconds),
        "tokens_per_second": tokens / sum(seconds),
        "curve": {"training": history.training, "held_out": history.held_out},
        "written": report["examples"],
        "device": str(device()),
        "versions": versions(),
    }


# --- a process for each cell


def serve() -> None:
    """Run the cells whose files are read from standard input; answer each with its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks decides
    pending = b""
    print("ready", flush=True)
    while more := os.read(0, 65536):
        pending += more
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            print(_forked(Path(line.decode())), flush=True)


def _forked(file: Path) -> int:
    child = os.fork()
    if not child:
        _inside(file)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if select.select([0], [], [], 0.05)[0] and not os.read(0, 1):  # nothing else is asked meanwhile
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            sys.exit(1)


def _inside(file: Path) -> None:
    """The forked process: run, and leave with an exit code; what it prints goes into a log beside the cell."""
    code = 1
    with contextlib.suppress(BaseException), (file.parent / "log.txt").open("w", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        try:
            run(file)
            code = 0
        except VeneerError as error:
            print(f"{type(error).__name__}: {error}")
            code = 1 if isinstance(error, Diverged) else MISTAKE  # another seed or rate may not
        except BaseException as error:
            traceback.print_exc()
            reason = (str(error).strip().splitlines() or ["no reason was given"])[0]
            print(f"{type(error).__name__}: {reason}")
    os._exit(code)


if __name__ == "__main__":
    del veneer
    serve()
