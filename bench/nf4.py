"""How fast is NF4 made dense, packed and multiplied by on a CPU? Each kernel beside a copy and beside bitsandbytes.

    .venv/bin/python bench/nf4.py [--full]

Everything is measured in turns, so that what else the machine does falls on all alike: medians, with the quartiles in
brackets. One thread is measured by its processor time, which other programs hardly lengthen, two by the clock: with
--full alone, as is the product of many tokens. The figures of a named machine are kept in bench/results/.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from veneer.formats.nf4 import NF4Linear
from veneer.ops import nf4, nf4_cpu, nf4_kernels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb

SIZE = 4096
ROUNDS = 7
SECONDS = 2.0
"""At the most for one row of a table, once each of its columns was measured three times."""
TOKENS, MANY = (1, 16), 512
DTYPES = (torch.bfloat16, torch.float32)


def interleaved(jobs) -> dict[str, list[float]]:
    """Seconds of each job in each round; the first round is for warming up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in jobs}
    started = time.perf_counter()
    for number in range(ROUNDS + 1):
        for name, job in jobs.items():
            start = clock()
            job()
            times[name].append(clock() - start)
        if number >= 3 and time.perf_counter() - started > SECONDS:
            break
    return {name: seconds[1:] for name, seconds in times.items()}


def spread(values: list[float], digits: int = 1) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def ratio(one: list[float], other: list[float]) -> str:
    """How many times as long `one` took, round by round."""
    return f"{statistics.median(a / b for a, b in zip(one, other, strict=True)):.1f}"


def dense(packed: nf4.Packed, dtype: torch.dtype) -> dict:
    """Ways to make a weight dense, in new memory and in memory that is there already."""
    name = str(dtype).removeprefix("torch.")
    source, memory = nf4.dequantize(packed, dtype), torch.empty(packed.shape, dtype=dtype)
    c, peer = nf4_kernels.KERNELS["c"], nf4_kernels.KERNELS["bitsandbytes"]

    def pieces() -> None:
        for _ in nf4_kernels._pieces(packed, dtype, c, False):
            pass

    times = interleaved(
        {
            "copy": lambda: memory.copy_(source),
            "c, piece by piece": pieces,
            "c": lambda: nf4_cpu.tile(packed, range(SIZE), range(SIZE), memory.view(-1)),
            "copy, new": source.clone,
            "c, new": lambda: c.dequantize(packed, dtype),
            "bitsandbytes, new": lambda: peer.dequantize(packed, dtype),
        }
    )
    size = source.numel() * source.element_size() / 1e9
    speeds = {key: spread([size / second for second in seconds]) for key, seconds in times.items()}
    theirs = times["bitsandbytes, new"]
    gain = {"c, new / b.": ratio(theirs, times["c, new"]), "pieces / b.": ratio(theirs, times["c, piece by piece"])}
    return {"threads": str(torch.get_num_threads()), "dtype": name, **speeds, **gain}


def slow(packed: nf4.Packed, dtype: torch.dtype) -> dict:
    """The plain torch ways, once each, on one thread."""
    size = packed.shape[0] * packed.shape[1] * dtype.itemsize / 1e9
    row = {"threads": str(torch.get_num_threads()), "dtype": str(dtype).removeprefix("torch.")}
    for name in ("table", "reference"):
        start = time.process_time()
        nf4_kernels.KERNELS[name].dequantize(packed, dtype)
        row[name] = f"{size / (time.process_time() - start):.2f}"
    return row


def packing(weight: torch.Tensor) -> dict:
    """Millions of weights a second."""
    times = interleaved(
        {
            "c": lambda: nf4_cpu.quantize(weight, 64, True),
            "bitsandbytes": lambda: bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True),
        }
    )
    start = time.process_time()
    nf4.quantize(weight[: SIZE // 8])
    speeds = {key: spread([weight.numel() / 1e6 / s for s in seconds], 0) for key, seconds in times.items()}
    return {
        "threads": str(torch.get_num_threads()),
        "dtype": str(weight.dtype).removeprefix("torch."),
        **speeds,
        "reference, once, by processor time": f"{weight.numel() / 8e6 / (time.process_time() - start):.0f}",
        "c / b.": ratio(times["bitsandbytes"], times["c"]),
    }


def linears(weight: torch.Tensor) -> dict[str, nn.Module]:
    """A dense linear, Veneer's, and bitsandbytes' as it trains: its AVX-512 path answers, but has no gradient."""
    plain = nn.Linear(SIZE, SIZE, bias=False).to(weight.dtype)
    plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
    theirs = bnb.nn.Linear4bit(SIZE, SIZE, bias=False, quant_type="nf4", compute_dtype=weight.dtype)
    theirs.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", module=theirs)
    theirs.support_avx512bf16_for_cpu = False
    return {"dense": plain, "veneer": NF4Linear(plain, 64, True), "bitsandbytes": theirs.to("cpu")}


def product(modules: dict[str, nn.Module], dtype: torch.dtype, tokens: int) -> dict:
    """Milliseconds of a forward and a backward."""
    x = torch.randn(tokens, SIZE, dtype=dtype, requires_grad=True)
    seed = torch.randn(tokens, SIZE, dtype=dtype)
    times = interleaved(
        {name: lambda module=module: torch.autograd.grad(module(x), x, seed) for name, module in modules.items()}
    )
    return {
        "threads": str(torch.get_num_threads()),
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": str(tokens),
        **{name: spread([1000 * second for second in seconds]) for name, seconds in times.items()},
        "veneer / dense": ratio(times["veneer"], times["dense"]),
        "bitsandbytes / veneer": ratio(times["bitsandbytes"], times["veneer"]),
    }


def show(title: str, rows: list[dict]) -> None:
    """A table that Markdown reads."""
    print(f"\n{title}\n")
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help=f"two threads too, and {MANY} tokens")
    asked = parser.parse_args()
    torch.manual_seed(0)
    counts = [count for count in (1, 2) if count <= (os.cpu_count() or 1)] if asked.full else [1]
    sizes = (*TOKENS, MANY) if asked.full else TOKENS
    weight = torch.randn(SIZE, SIZE) * 0.02
    packed = nf4.quantize(weight)
    load = os.getloadavg()[0]
    tables: dict[str, list[dict]] = {
        "Dense from NF4, GB/s written": [],
        "The same in plain torch, GB/s, once": [],
        "Packing, millions of weights a second": [],
        "Forward and backward of a linear, ms": [],
    }
    makes, plain, packs, products = tables.values()
    for dtype in DTYPES:
        modules = linears(weight.to(dtype))
        for count in counts:
            torch.set_num_threads(count)
            makes.append(dense(packed, dtype))
            packs.append(packing(weight.to(dtype)))
            products += [product(modules, dtype, tokens) for tokens in sizes]
        torch.set_num_threads(1)
        plain.append(slow(packed, dtype))
    print(f"{processor()}, {os.cpu_count()} cores, {nf4_cpu.VECTORS[nf4_cpu.vectors()]}; load {load:.1f} before,")
    print(f"{os.getloadavg()[0]:.1f} after; Python {platform.python_version()}, torch {torch.__version__},")
    print(f"bitsandbytes {bnb.__version__}; {SIZE}x{SIZE}, blocks of 64, double quantization; medians (quartiles).")
    for title, rows in tables.items():
        show(title, rows)


if __name__ == "__main__":
    main()
