"""Does a step of QLoRA on a model of Llama-7B's shape fit into 8 GiB of memory, on a CPU?

    .venv/bin/python bench/llama_7b.py [--full]

Every weight is drawn anew in bfloat16 and packed before the next one is drawn; LoRA goes on every linear, and one step
of AdamW is taken with checkpointing. Prints bytes by part, seconds, and the process's greatest resident memory: of two
of the 32 blocks, which every other one is like, or with --full of all, where the limit is held to.
"""

from __future__ import annotations

import argparse
import platform
import time

import torch
import transformers
from process_memory import status
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import veneer
from veneer.formats.nf4 import NF4Linear
from veneer.ops import nf4_kernels

GIB = 2**30
LIMIT = 8 * GIB
LAYERS, FEW = 32, 2


def build(layers: int) -> nn.Module:
    """A random Llama in bfloat16 whose blocks' linears are packed one by one."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, dtype=torch.bfloat16
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            dense = nn.Linear(
                module.in_features, module.out_features, bias=False, device="meta", dtype=torch.bfloat16
            ).to_empty(device="cpu")
            nn.init.normal_(dense.weight, std=config.initializer_range)
            model.set_submodule(path, NF4Linear(dense, block_size=64, double_quant=True))
        elif isinstance(module, nn.Linear | nn.Embedding):
            module.to_empty(device="cpu")
            nn.init.normal_(module.weight, std=config.initializer_range)
        elif type(module).__name__ == "LlamaRMSNorm":
            module.to_empty(device="cpu")
            nn.init.ones_(module.weight)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help=f"all {LAYERS} blocks")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.manual_seed(0)
    console = Console(width=100)
    table = Table("what", "bytes", "GiB", "seconds")

    start = time.perf_counter()
    layers = LAYERS if options.full else FEW
    model = build(layers)
    built = time.perf_counter() - start
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    four = size([module.weight for module in packed])
    magnitudes = sum(size(module.buffers()) for module in packed)
    ids = {id(module.weight) for module in packed}
    dense = size([p for p in model.parameters() if id(p) not in ids])
    weights = sum(module.in_features * module.out_features for module in packed)
    after_build = status()

    start = time.perf_counter()
    adapter = veneer.attach(model, veneer.LoRA(rank=options.rank, alpha=options.rank))
    attached = time.perf_counter() - start
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)
    tokens = torch.randint(0, 32000, (1, options.tokens))
    start = time.perf_counter()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    forward = time.perf_counter() - start
    start = time.perf_counter()
    loss.backward()
    backward = time.perf_counter() - start
    without = [name for name, parameter in adapter.named_parameters() if parameter.grad is None]
    start = time.perf_counter()
    optimizer.step()
    stepped = time.perf_counter() - start

    def row(what: str, count: int, seconds: float | None = None) -> None:
        table.add_row(what, f"{count:,}", f"{count / GIB:.3f}", "" if seconds is None else f"{seconds:.1f}")

    row(f"{len(packed)} linears, {weights:,} weights, 4 bits each", four)
    row("their magnitudes", magnitudes)
    row("embedding, head, norms (bfloat16)", dense)
    row(f"adapter: LoRA of rank {options.rank} on all linears (float32)", size(adapter.parameters()), attached)
    row("its gradients", size([p.grad for p in adapter.parameters() if p.grad is not None]))
    row("Adam's moments", size([t for state in optimizer.state.values() for t in state.values()]))
    row("greatest resident memory after building", after_build, built)
    row("  and after the step", status(), forward + backward + stepped)
    console.print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads, kernel {nf4_kernels.chosen('cpu')}"
    )
    console.print(table)
    total, peak = veneer.count_parameters(model).total, status()
    console.print(f"{total:,} parameters; {8 * (four + magnitudes) / weights:.3f} bits a packed weight")
    console.print(f"{options.tokens} tokens, loss {loss.item():.3f}; {len(without)} adapter tensors without gradient")
    console.print(f"forward {forward:.1f} s, backward {backward:.1f} s, optimizer {stepped:.1f} s")
    where = f"{'under' if peak < LIMIT else 'over'} {LIMIT // GIB} GiB"
    console.print(f"peak {peak / GIB:.2f} GiB with {layers} of {LAYERS} blocks{f', {where}' if options.full else ''}")
    assert not without
    assert peak < LIMIT


if __name__ == "__main__":
    main()
