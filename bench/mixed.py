"""What does a batch of many adapters cost beside one, and how long does it take to swap one of a thousand in?

    .venv/bin/python bench/mixed.py [--rounds 7] [--adapters 32] [--rows 64] [--device cuda]

A Llama of random weights, its seven linears a block under LoRA of rank 8. Veneer's `rows` and PEFT's `adapter_names`
run in one process, turn by turn, on the same base: no adapter, one for all rows, then `rows` rows over `adapters`
adapters, at one and at sixteen tokens a row. Each runs once before it is timed, as a step of a generation follows
another. PEFT's time over that of the base alone is what nothing could exceed. Times are of the processor, with one
thread, which what else runs on the machine disturbs less than the clock. A ratio is that of a round; printed are the
median and the middle half of them. `--device cuda` runs on a GPU, by the clock, and says which kernels were chosen.

Then adapters of 5 MB, in the page cache, are swapped one after the other into one that is attached: 1,000 folders,
whose files are links to those of 20 that differ. The first swap, which checks more, is not counted. Figures of a named
machine are kept in bench/results/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer.ops import kernels

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DISTINCT = 20


def llama(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_attention_heads": width // 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_hidden_layers=layers, **sizes)).eval()


def with_veneer(width: int, layers: int, adapters: int):
    model = llama(width, layers)
    for number in range(adapters):
        one = veneer.attach(model, veneer.LoRA(rank=8), name=f"a{number}")
        for key, tensor in one.named_tensors():
            if key.endswith(".B"):
                torch.nn.init.normal_(tensor, std=0.02)
    return model


def with_peft(width: int, layers: int, adapters: int):
    config = peft.LoraConfig(r=8, target_modules=SEVEN, init_lora_weights=False)
    model = peft.get_peft_model(llama(width, layers), config, adapter_name="a0")
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", config)
    return model.eval()


def clock(run, device: str = "cpu") -> float:
    """Seconds of the processor, or by the clock until a GPU is done."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def mixed(asked: argparse.Namespace, table: Table) -> None:
    ours = with_veneer(asked.width, asked.layers, asked.adapters).to(asked.device)
    theirs = with_peft(asked.width, asked.layers, asked.adapters).to(asked.device)
    theirs.set_adapter("a0")
    rows = [f"a{number % asked.adapters}" for number in range(asked.rows)]
    for tokens in (1, 16):
        ids = torch.randint(0, 1000, (asked.rows, tokens)).to(asked.device)
        cases = {
            "base": lambda ids=ids: ours(input_ids=ids, use_cache=False),
            "one": lambda ids=ids: ours(input_ids=ids, use_cache=False),
            "many": lambda ids=ids: ours(input_ids=ids, use_cache=False),
            "peft one": lambda ids=ids: theirs(input_ids=ids, use_cache=False),
            "peft many": lambda ids=ids: theirs(input_ids=ids, use_cache=False, adapter_names=rows),
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(asked.rounds + 1):
            for name, run in cases.items():
                options = {"rows": rows} if name == "many" else {}
                names = ("a0",) if name == "one" else ()
                with veneer.use(ours, *names, **options), torch.no_grad():
                    run()
                    took = clock(run, asked.device)
                if turn:
                    times[name].append(took)
        ratio = lambda a, b: spread([x / y for x, y in zip(times[a], times[b], strict=True)])  # noqa: B023, E731
        table.add_row(
            str(tokens),
            *(f"{statistics.median(times[name]) * 1e3:.1f}" for name in cases),
            ratio("many", "one"),
            ratio("peft many", "peft one"),
            ratio("peft many", "many"),
            ratio("peft many", "base"),
        )


def swapped(asked: argparse.Namespace, console: Console) -> None:
    model = llama(asked.width, asked.layers)
    slot = veneer.attach(model, veneer.LoRA(rank=asked.swap_rank), name="slot")
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(number) for number in range(asked.on_disk)]
        for number, folder in enumerate(folders):
            if number >= DISTINCT:
                shutil.copytree(folders[number % DISTINCT], folder, copy_function=os.link)
                continue
            for tensor in slot.parameters():
                torch.nn.init.normal_(tensor, std=0.02)
            veneer.save(slot, folder)
        size = sum(file.stat().st_size for file in folders[0].iterdir())
        for folder in folders[:DISTINCT]:
            (folder / "adapter_model.safetensors").read_bytes()
        times, waits = [], []
        for folder in folders:
            start = time.perf_counter()
            times.append(clock(lambda folder=folder: veneer.swap(model, slot, folder)))
            waits.append(time.perf_counter() - start)
    times, waits = sorted(times[1:]), sorted(waits[1:])
    console.print(
        f"swapping in one of {asked.on_disk} adapters, {size / 1e6:.2f} MB and {len(slot.claims)} linears each: median "
        f"{statistics.median(times) * 1e3:.2f} ms of the processor, 9 of 10 within "
        f"{times[len(times) * 9 // 10] * 1e3:.2f}; by the clock {statistics.median(waits) * 1e3:.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--swap-rank", type=int, default=56)
    parser.add_argument("--on-disk", type=int, default=1000)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console = Console(width=200)
    columns = ["base ms", "one ms", "many ms", "peft one ms", "peft many ms", "many / one", "peft's"]
    table = Table("tokens a row", *columns, "peft many / many", "peft many / base")
    mixed(asked, table)
    console.print(f"torch {torch.__version__}, peft {peft.__version__}, one thread; {asked}")
    console.print(table)
    for choice in kernels.choices():
        console.print(choice)
    swapped(asked, console)


if __name__ == "__main__":
    main()
