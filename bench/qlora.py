"""What does training on a four-bit base cost in accuracy, memory and time? LoRA on MiniLM stored in seven ways.

    .venv/bin/python bench/qlora.py [--full] [--seeds 1]

The linears of the blocks are stored in float32, in Veneer's NF4 (with and without double quantization), in
bitsandbytes' FP4, and in torchao's int4, with and without zero points; LoftQ starts LoRA from what NF4 lost. All see
the same sentences from the same start. The error is |W - Q| / |W| in the Frobenius norm, the mean over the linears.
Int4 with zero points is not trained on: its float32 product on a CPU takes minutes a batch. A few steps and held-out
sentences; with --full 60 and 1,000. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import fmean
from typing import Any

import bitsandbytes
import torch
import transformers
from reviews import BATCH, HEAD, HELD_OUT, Run, Task
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

import veneer
from veneer import formats
from veneer.train.machine import fitted_to_machine

STEPS, FEW_STEPS, FEW_HELD_OUT, LONGEST, LR, BLOCK = 60, 12, 200, 32, 2e-3, 64


def nf4(model: Any) -> Any:
    return veneer.quantize(model, veneer.NF4(BLOCK, double_quant=False))


def nf4_double(model: Any) -> Any:
    return veneer.quantize(model, veneer.NF4(BLOCK))


def fp4(model: Any) -> Any:
    for path, linear in linears(model).items():
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, compute_dtype=torch.float32, compress_statistics=False,
            quant_type="fp4",
        )  # fmt: skip
        packed.load_state_dict(linear.state_dict())
        model.set_submodule(path, packed.to("cpu"))
    return model


def int4_even(model: Any) -> Any:
    quantize_(model.bert.encoder, IntxWeightOnlyConfig(torch.int4, PerGroup(BLOCK)))
    return model


def int4_shifted(model: Any) -> Any:
    quantize_(model.bert.encoder, PrototypeInt4WeightOnlyConfig(BLOCK, set_inductor_config=False))
    return model


BASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "float32": (lambda model: model, "kaiming"),
    "NF4": (nf4, "kaiming"),
    "NF4, double quantization": (nf4_double, "kaiming"),
    "NF4, double quantization, LoftQ": (nf4_double, "loftq"),
    "FP4 (bitsandbytes)": (fp4, "kaiming"),
    "int4, symmetric (torchao)": (int4_even, "kaiming"),
    "int4 with zero points (torchao)": (int4_shifted, ""),
}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help=f"{STEPS} steps, {HELD_OUT} held-out sentences")
    parser.add_argument("--seeds", type=int, default=1, help="how many orders of the sentences, and starts of LoRA")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with fitted_to_machine():
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """One row a way to store the base."""
    steps, held_out = (STEPS, HELD_OUT) if options.full else (FEW_STEPS, FEW_HELD_OUT)
    tasks = [Task(steps, held_out, LONGEST, seed) for seed in range(options.seeds)]
    dense = {path: linear.weight for path, linear in linears(tasks[0].model()).items()}
    numbers = sum(weight.numel() for weight in dense.values())
    others = sum(4 * p.numel() for p in tasks[0].model().parameters()) - 4 * numbers
    print(f"{len(dense)} linears of {numbers:,} weights; {steps} steps of {BATCH}; {options.seeds} seeds.\n")
    print("| base | error | bits a weight | MB of the model | before | after | CPU ms a step |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, (store, start) in BASES.items():
        model = store(tasks[0].model())
        error = fmean(lost(weight, model.get_submodule(path)) for path, weight in dense.items())
        packed = sum(stored(model.get_submodule(path)) for path in dense)
        row = f"| {name} | {error:.4f} | {8 * packed / numbers:.3f} | {(packed + others) / 1e6:.1f} |"
        if not start:
            print(f"{row} | | |")
            continue
        befores, afters, seconds = zip(*(one(task, store, start) for task in tasks), strict=True)
        print(
            f"{row} {fmean(befores):.3f} | {fmean(afters):.3f} ({', '.join(f'{a:.3f}' for a in afters)}) | "
            f"{1000 * fmean(seconds) / steps:.0f} |",
            flush=True,
        )


def one(task: Task, store: Callable[[Any], Any], start: Any) -> tuple[float, float, float]:
    """Held-out accuracy before and after training, and the CPU seconds between."""
    model = store(task.model())
    adapter = veneer.attach(model, veneer.LoRA(rank=8, init=start), also_train=HEAD)
    if start == "loftq":
        veneer.calibrate(model, adapter, task.model())
    before = task.judge(model, task.held_out).right.float().mean().item()
    run = Run(model, adapter, LR, task.training).until(len(task.training))
    return before, task.judge(model, task.held_out).right.float().mean().item(), run.seconds


def linears(model: Any) -> dict[str, nn.Linear]:
    """The linears of the blocks by path."""
    found = model.bert.encoder.named_modules(prefix="bert.encoder")
    return {path: module for path, module in found if isinstance(module, nn.Linear)}


def lost(weight: Tensor, module: nn.Module) -> float:
    """|W - Q| / |W|."""
    form = formats.of(module)
    assert form is not None
    return ((form.read(module, "weight") - weight).norm() / weight.norm()).item()


def stored(module: Any) -> float:
    """The bytes that a weight takes, its statistics with it."""
    weight = module.weight
    if hasattr(weight, "tensor_data_names"):  # torchao's, which is made of several
        return sum(vars(weight)[name].nbytes for name in weight.tensor_data_names)
    state = vars(weight).get("quant_state")
    statistics = [] if state is None else [state.absmax, state.code]
    return sum(t.nbytes for t in (weight.data, *module.buffers(), *statistics))


if __name__ == "__main__":
    main()
