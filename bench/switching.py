"""What do attaching, loading, switching and carrying adapters cost? Veneer beside peft, interleaved in one process.

    .venv/bin/python bench/switching.py [--rounds 100]

Carrying: one token through linears in float32 and bfloat16, without gradients; a call's time over the bare layer's.
Attaching and loading: models of ever more small linears; the time a linear stays the same where it is linear in all.
Switching: from one of two attached adapters to the other. Everything is the least
of its rounds, peer and own by turns, in seconds of the processor, which other programs touch less than the clock's.
"""

from __future__ import annotations

import argparse
import copy
import platform
import tempfile
import time
import warnings
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import veneer

DEPTH = 20
SIZES = (250, 500, 1000)
CONFIG = {"r": 8, "target_modules": ["q_proj"]}


class Layers(nn.Module):
    """`count` linears of a width, one after the other."""

    def __init__(self, count: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(width, width)}) for _ in range(count))
        self.to(dtype).requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer["q_proj"](x)
        return x


def seconds(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def least(runs: dict, rounds: int) -> dict[str, list[float]]:
    """The times of each, by turns."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


@torch.no_grad()
def carrying(rounds: int) -> Table:
    table = Table("one token", "bare, us", "veneer, +us", "peft, +us", "veneer / peft", "of quarters of the rounds")
    for dtype in (torch.float32, torch.bfloat16):
        for width in (64, 576):
            base = Layers(DEPTH, width, dtype).eval()
            ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
            veneer.attach(ours, veneer.LoRA(rank=8), where="*.q_proj")
            theirs = peft.get_peft_model(theirs, peft.LoraConfig(**CONFIG)).base_model.model
            x = torch.randn(1, 1, width, dtype=dtype)
            models = {"bare": base.eval(), "veneer": ours.eval(), "peft": theirs.eval()}
            times = least({name: lambda m=m, x=x: m(x) for name, m in models.items()}, rounds)
            bare, own, peer = (min(each) / DEPTH * 1e6 for each in times.values())
            quarters = [[min(each[k::4]) for each in times.values()] for k in range(4)]
            spread = sorted((own - bare) / (peer - bare) for bare, own, peer in quarters)
            name = f"{str(dtype).removeprefix('torch.')}, {width} wide"
            row = f"{bare:.1f}", f"{own - bare:.1f}", f"{peer - bare:.1f}", f"{(own - bare) / (peer - bare):.2f}"
            table.add_row(name, *row, f"{spread[0]:.2f} to {spread[-1]:.2f}")
    return table


def growing() -> Table:
    table = Table(
        "linears", "attach, us a linear", "peft", "load, us a linear", "peft", "switch, us in all", "peft, us in all"
    )
    for count in SIZES:
        found: dict[str, list[float]] = {
            name: [] for name in ("attach", "load", "switch", "peft attach", "peft load", "peft switch")
        }
        for _ in range(2):
            ours, theirs = Layers(count, 8), Layers(count, 8)
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapter = None

                def attach(model=ours):
                    nonlocal adapter
                    adapter = veneer.attach(model, veneer.LoRA(rank=8), where="*.q_proj", name="one")

                found["attach"].append(seconds(attach))
                veneer.save(adapter, Path(folder) / "ours")
                found["load"].append(seconds(lambda m=ours, f=folder: veneer.load(m, Path(f) / "ours", name="two")))
                wrapped = None

                def wrap(model=theirs):
                    nonlocal wrapped
                    wrapped = peft.get_peft_model(model, peft.LoraConfig(**CONFIG))

                found["peft attach"].append(seconds(wrap))
                wrapped.save_pretrained(Path(folder) / "theirs")
                load = lambda w=wrapped, f=folder: w.load_adapter(Path(f) / "theirs", "two")  # noqa: E731
                found["peft load"].append(seconds(load))

                def use(model=ours):
                    with veneer.use(model, "one"):
                        pass

                times = least({"switch": use, "peft switch": lambda w=wrapped: w.set_adapter("default")}, 5)
                for name, each in times.items():
                    found[name].append(min(each))
        each = {name: min(times) for name, times in found.items()}
        row = [each["attach"], each["peft attach"], each["load"], each["peft load"]]
        switches = f"{each['switch'] * 1e6:.0f}", f"{each['peft switch'] * 1e6:.0f}"
        table.add_row(str(count), *(f"{time / count * 1e6:.0f}" for time in row), *switches)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    machine = platform.processor() or platform.machine()
    console = Console(width=140)
    console.print(f"torch {torch.__version__}, peft {peft.__version__}, {torch.get_num_threads()} threads, {machine}")
    console.print(carrying(options.rounds))
    console.print(growing())


if __name__ == "__main__":
    main()
