"""What does it save to keep what the blocks below the lowest adapter compute, with adapters in the top third?

    .venv/bin/python bench/frozen.py [--steps 4]

A step (forward and backward) of a Llama of 12 blocks with LoRA on all linears of the upper four, loss in chunks: as it
is, with the hidden states of the lower eight read from disk, and, for comparison, with LoRA in all blocks. Interleaved
in one process, step by step on the same rows; seconds are of the processor, and the least of all steps is taken. Prints
a table; the figures of a named machine are kept in bench/results/.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer.train.data.collate import Tokens
from veneer.train.frozen import FrozenBlocks

LAYERS, ROWS, TOKENS, VOCABULARY = 12, 4, 128, 8192
UPPER = " | ".join(f"model.layers.{n}.*_proj" for n in range(LAYERS * 2 // 3, LAYERS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "num_attention_heads": 6}
    everywhere = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).train()
    upper = copy.deepcopy(everywhere)
    for model, where in ((everywhere, "linear"), (upper, UPPER)):
        torch.manual_seed(1)
        veneer.attach(model, veneer.LoRA(rank=8), where=where)
        veneer.chunk_loss(model)
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS))
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    batch = Tokens(0)(rows)
    with tempfile.TemporaryDirectory() as folder:
        frozen = FrozenBlocks(upper, Tokens(0), rows, [TOKENS] * ROWS, Path(folder))

        def step(model: LlamaForCausalLM, kept: bool) -> tuple[float, float]:
            start = time.process_time()
            with frozen.serving(range(ROWS), batch) if kept else nullcontext():
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            return time.process_time() - start, float(loss.detach())

        ways: dict[str, Callable[[], tuple[float, float]]] = {
            "LoRA in all blocks": lambda: step(everywhere, False),
            "LoRA in the upper third": lambda: step(upper, False),
            "the same, lower blocks kept": lambda: step(upper, True),
        }
        for way in ways.values():
            way()  # the first fills what is kept
        found = {name: [way() for name_, way in ways.items() if name_ == name] for name in ways}
        for _ in range(asked.steps - 1):
            for name, way in ways.items():
                found[name].append(way())
        size = frozen.bytes
    table = Table("", "CPU s a step", "of all blocks", "of the upper third", "loss")
    least = {name: min(seconds for seconds, _ in runs) for name, runs in found.items()}
    first, second, _ = least.values()
    for name, seconds in least.items():
        loss = found[name][0][1]
        table.add_row(name, f"{seconds:.3f}", f"{seconds / first:.2f}", f"{seconds / second:.2f}", f"{loss:.7f}")
    Console().print(
        f"{LAYERS} blocks of width 384, {ROWS} rows of {TOKENS} tokens, vocabulary {VOCABULARY}, float32, one thread; "
        f"{size / 2**20:.1f} MiB kept; torch {torch.__version__}, transformers {transformers.__version__}"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
