"""What do LoRA and DoRA keep for backward, and what does a step take? Veneer beside peft and the frozen model.

    .venv/bin/python bench/lora.py [--rounds 5] [--layers 1] [--dtype bfloat16] [--all] [--device cuda]

A Llama-like model: hidden 576, vocabulary 8,192, batch 4 x 256, rank 8 on all seven linears, float32 adapters. Bytes
are counted by unique storage, the model's own left out, on 12 layers whose operations are those of fake tensors, which
keep as much and compute nothing. Steps run by turns in one process, forward and backward without an optimizer, on
`layers` layers, in seconds of the processor, which other programs touch less than those of the clock; `--all` times
the other methods too. `--device cuda` takes the times on a GPU, by the clock, and says which kernels were chosen. The
frozen model's backward goes to its input and to nothing else: the bound.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

import veneer
from veneer.ops import kernels
from veneer.ops.dropout import drawn

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
METHODS = {
    "LoRA": (veneer.LoRA(rank=8), peft.LoraConfig(r=8, target_modules=SEVEN)),
    "LoRA, dropout 0.05": (
        veneer.LoRA(rank=8, dropout=0.05),
        peft.LoraConfig(r=8, target_modules=SEVEN, lora_dropout=0.05),
    ),
    "DoRA": (veneer.DoRA(rank=8), peft.LoraConfig(r=8, target_modules=SEVEN, use_dora=True)),
    "DoRA, dropout 0.05": (
        veneer.DoRA(rank=8, dropout=0.05),
        peft.LoraConfig(r=8, target_modules=SEVEN, use_dora=True, lora_dropout=0.05),
    ),
    "VeRA": (veneer.VeRA(rank=256), peft.VeraConfig(r=256, target_modules=SEVEN)),
    "IA3": (veneer.IA3(), peft.IA3Config(**IA3)),
}
IDS = torch.randint(0, 8192, (4, 256), generator=torch.Generator().manual_seed(0))


def model(layers: int, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 8192, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).train()


def now(device: str) -> float:
    """Seconds of the processor, or by the clock when a GPU is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Frozen:
    """The bound: backward to the input embeddings alone."""

    def __init__(self, layers: int, dtype: torch.dtype) -> None:
        self.model = model(layers, dtype)
        self.ids = IDS

    def to(self, device: str) -> Frozen:
        self.model, self.ids = self.model.to(device), self.ids.to(device)
        return self

    def loss(self) -> torch.Tensor:
        embeddings = self.model.get_input_embeddings()(self.ids).detach().requires_grad_()
        return self.model(inputs_embeds=embeddings, labels=self.ids).loss


class Adapted(Frozen):
    """With an adapter of ours or theirs."""

    def __init__(self, method, layers: int, dtype: torch.dtype) -> None:
        super().__init__(layers, dtype)
        if isinstance(method, veneer.Method):
            veneer.attach(self.model, method)
        else:
            self.model = peft.get_peft_model(self.model, method)

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.ids, labels=self.ids).loss


def kept(run: Frozen) -> int:
    """Bytes saved for backward, by unique storage, without the model's own."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    mine = [*run.model.parameters(), *run.model.buffers()]
    mine += [fake.from_tensor(tensor) for tensor in mine]
    own = {tensor.untyped_storage()._cdata for tensor in mine}
    storages, alive = {}, []  # alive, so that no storage gets the place of another

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage.nbytes()
        alive.append(storage)
        return tensor

    with fake, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.loss()
    return sum(storages.values())


def step(run: Frozen) -> float:
    device = run.ids.device.type
    start = now(device)
    run.loss().backward()
    seconds = now(device) - start
    run.model.zero_grad()
    return seconds


def memory(dtype: torch.dtype) -> Table:
    bound = kept(Frozen(12, dtype))
    table = Table("kept for backward", "veneer, MiB", "peft, MiB", "veneer / peft", "veneer / frozen")
    table.add_row("frozen model", f"{bound / 2**20:.1f}", "", "", "1.000")
    for name, (ours, theirs) in METHODS.items():
        own, peer = kept(Adapted(ours, 12, dtype)), kept(Adapted(theirs, 12, dtype))
        row = f"{own / 2**20:.1f}", f"{peer / 2**20:.1f}", f"{own / peer:.3f}", f"{own / bound:.3f}"
        table.add_row(name, *row)
    return table


def times(layers: int, dtype: torch.dtype, rounds: int, every: bool, device: str) -> Table:
    names = list(METHODS) if every else ["LoRA", "LoRA, dropout 0.05", "DoRA"]
    runs = {"frozen": Frozen(layers, dtype)}
    for name in names:
        ours, theirs = METHODS[name]
        runs |= {name: Adapted(ours, layers, dtype), f"peft {name}": Adapted(theirs, layers, dtype)}
    runs = {name: run.to(device) for name, run in runs.items()}
    found = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            found[name].append(step(run))
    found = {name: each[1:] for name, each in found.items()}  # the first is a warming up
    best = {name: min(each) for name, each in found.items()}
    bound = best["frozen"]
    columns = "veneer, ms", "peft, ms", "veneer / peft", "of rounds", "veneer / frozen", "what is added, veneer / peft"
    table = Table("step", *columns)
    table.add_row("frozen model", f"{bound * 1e3:.0f}", "", "", "", "1.000", "")
    for name in names:
        own, peer = best[name], best[f"peft {name}"]
        spread = sorted(a / b for a, b in zip(found[name], found[f"peft {name}"], strict=True))
        ratios = f"{own / peer:.2f}", f"{spread[0]:.2f} to {spread[-1]:.2f}", f"{own / bound:.3f}"
        table.add_row(name, f"{own * 1e3:.0f}", f"{peer * 1e3:.0f}", *ratios, f"{(own - bound) / (peer - bound):.2f}")
    return table


@torch.no_grad()
def masks(dtype: torch.dtype, device: str) -> Table:
    """A forward of dropout; of one that keeps no mask, backward takes the same again."""
    table = Table("dropout of 1,024 x 1,536", "veneer, ms", "torch, ms", "a copy, ms", "veneer / torch")
    x, module = torch.randn(1024, 1536).to(device, dtype), torch.nn.Dropout(0.05)
    runs = {"veneer": lambda: drawn(module, x)(x), "torch": lambda: module(x), "copy": x.clone}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(30):
        for name, run in runs.items():
            start = now(device)
            run()
            best[name] = min(best[name], now(device) - start)
    table.add_row(str(dtype), *(f"{each * 1e3:.2f}" for each in best.values()), f"{best['veneer'] / best['torch']:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]
    console, machine = Console(width=140), platform.processor() or platform.machine()
    if options.device == "cuda":
        machine = torch.cuda.get_device_name()
    console.print(f"torch {torch.__version__}, peft {peft.__version__}, {torch.get_num_threads()} threads, {machine}")
    console.print(memory(dtype))
    console.print(masks(dtype, options.device))
    console.print(times(options.layers, dtype, options.rounds, options.all, options.device))
    for choice in kernels.choices():
        console.print(choice)


if __name__ == "__main__":
    main()
