"""Is what a plan says what a step takes? Predicted against measured, on this machine's CPU.

    .venv/bin/python bench/plan.py [--full] [--results FILE]

First the bytes that autograd saves for backward: every method on six architectures, counted on the meta device from two
depths, beside the same count of a real step on the CPU (torch's hooks, each storage once). Then the highest resident
size (VmHWM) of two real training steps with AdamW, each in a process of its own, beside the predicted peak, whose
overhead is that process itself before the model is built. Two of the architectures, and LoRA on one model; with --full
all. Prints both tables; --results keeps them as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from process_memory import apart, forget_peak, status
from transformers import BertConfig, GemmaConfig, GPT2Config, LlamaConfig, MixtralConfig, T5Config

import veneer
from veneer.errors import VeneerError
from veneer.plan import host, lines, tracing
from veneer.plan.plan import made
from veneer.seams import depths, loading

SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 4}
SMALL: dict[str, Any] = {
    "llama (grouped heads)": (LlamaConfig, "LlamaForCausalLM", {**SIZES, "num_key_value_heads": 2}),
    "gpt2": (GPT2Config, "GPT2LMHeadModel", {"n_embd": 128, "n_layer": 6, "n_head": 4}),
    "bert": (BertConfig, "BertForMaskedLM", SIZES),
    "t5": (
        T5Config,
        "T5ForConditionalGeneration",
        {"d_model": 128, "d_kv": 32, "d_ff": 352, "decoder_start_token_id": 0, "num_layers": 6, "num_heads": 4},
    ),
    "gemma": (GemmaConfig, "GemmaForCausalLM", {**SIZES, "num_key_value_heads": 1, "head_dim": 32}),
    "mixtral (experts)": (
        MixtralConfig,
        "MixtralForCausalLM",
        {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
}
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
PEAKS: dict[str, Any] = {
    "llama": (LlamaConfig, "LlamaForCausalLM", {**WIDE, "num_key_value_heads": 4}),
    "gpt2": (GPT2Config, "GPT2LMHeadModel", {"n_embd": 512, "n_layer": 8, "n_head": 8}),
    "bert": (BertConfig, "BertForMaskedLM", WIDE),
}
WAYS = (("full", False), ("lora", False), ("lora", True), ("qlora", False), ("prefix", False))
FEW, FEW_PEAKS, FEW_WAYS = ("llama (grouped heads)", "t5"), ("llama",), (("lora", False), ("lora", True))
ROWS, TOKENS, WIDE_TOKENS, VOCABULARY = 2, 32, 256, 4096


def config(table: dict[str, Any], family: str) -> Any:
    kind, name, sizes = table[family]
    return kind(vocab_size=VOCABULARY, architectures=[name], **sizes)


def setting(name: str, tokens: int, checkpointing: bool) -> tracing.Setting:
    one = lines.line(name)
    return tracing.Setting(
        one.method, None, ROWS, tokens, torch.float32, one.quantization, checkpointing, "whole", "cpu", None
    )


def real(found: Any, wanted: tracing.Setting, dense: str | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
    if wanted.quantization and dense is not None:
        model = veneer.load_quantized(dense, wanted.quantization)
    else:
        model = loading.class_of(found)(copy.deepcopy(found))
        if wanted.quantization:
            veneer.quantize(model, wanted.quantization)
    tracing.train_by(model, wanted)
    ghost = tracing.inputs(found, wanted)
    return model, {key: torch.ones(ids.shape, dtype=ids.dtype) for key, ids in ghost.items()}


def saved(families: Iterable[str]) -> list[tuple[str, str, bool, int, int]]:
    """(family, method, checkpointing, predicted, measured) bytes."""
    rows = []
    for family in families:
        for name in lines.every():
            for checkpointing in (False, True):
                found, wanted = config(SMALL, family), setting(name, TOKENS, checkpointing)
                try:
                    said = round(tracing.counts(found, wanted)[0]["saved"])
                    model, batch = real(found, wanted)
                except VeneerError as error:
                    print(f"{family} {name}: {error}", file=sys.stderr)
                    break
                got = tracing.saved_by(model, lambda m=model, b=batch: tracing.loss_of(m, b))[1]
                rows.append((family, name, checkpointing, said, got))
    return rows


def measure(family: str, name: str, checkpointing: bool, dense: str) -> dict[str, float]:
    """Of this process: its size before, the predicted peak, the measured one. `dense` is a folder to load NF4 from."""
    torch.set_num_threads(1)
    found, wanted = config(PEAKS, family), setting(name, WIDE_TOKENS, checkpointing)
    tiny = copy.deepcopy(found)
    small, _ = real(depths.shallow(tiny, dict.fromkeys(depths.depths(tiny), 2)), wanted)
    ids = torch.ones(1, 8, dtype=torch.long)
    tracing.loss_of(small, {"input_ids": ids, "attention_mask": ids}).backward()  # so that all code is loaded
    torch.optim.AdamW([p for p in small.parameters() if p.requires_grad]).step()
    del small
    planned = made(found, wanted, "adamw", None)
    before = host.resident()
    said = planned.peak.expected - planned.memory["overhead"].expected + before
    forget_peak()
    model, batch = real(found, wanted, dense)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        tracing.loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    keeps = host.kept(planned.counted["made"])[0]
    return {"before": before, "predicted": said + keeps, "kept": keeps, "measured": status()}


def peaks(
    families: Iterable[str], ways: Iterable[tuple[str, bool]]
) -> list[tuple[str, str, bool, dict[str, float], dict[str, float]]]:
    """(model, method, checkpointing, with malloc as it is, with a malloc that gives memory back)."""
    rows = []
    scratch = TemporaryDirectory()
    for family in families:
        dense = f"{scratch.name}/{family}"
        loading.class_of(config(PEAKS, family))(config(PEAKS, family)).save_pretrained(dense)
        for name, checkpointing in ways:
            if (family, name) == ("gpt2", "qlora"):
                continue  # its weights are no linears
            only = ("--only", family, name, str(int(checkpointing)), dense)
            found = [apart(*only, environment=os.environ | more) for more in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"})]
            rows.append((family, name, checkpointing, *found))
    return rows


def page(full: bool) -> str:
    mib, text = 2**20, []
    found = saved(SMALL if full else FEW)
    errors = [abs(said / got - 1) for *_, said, got in found]
    text += [
        f"## Saved for backward: {len(found)} steps, {ROWS} × {TOKENS} tokens, float32",
        "",
        f"Largest error {max(errors):.4%}; {sum(not error for error in errors)} of {len(errors)} are exact.",
        "",
        "| architecture | methods | MiB, least to most | with checkpointing | largest error |",
        "|---|---|---|---|---|",
    ]
    for family in SMALL if full else FEW:
        mine = [row for row in found if row[0] == family]
        spans = [[row[4] / mib for row in mine if row[2] is ck] for ck in (False, True)]
        worst = max(abs(said / got - 1) for *_, said, got in mine)
        cells = [f"{min(span):.2f} to {max(span):.2f}" for span in spans]
        text.append(f"| {family} | {len({row[1] for row in mine})} | {cells[0]} | {cells[1]} | {worst:.4%} |")
    rows = peaks(PEAKS, WAYS) if full else peaks(FEW_PEAKS, FEW_WAYS)
    text += [
        "",
        f"## Highest resident size: two steps with AdamW, {ROWS} × {WIDE_TOKENS} tokens, float32, one thread",
        "",
        "Of a process that gives memory back as soon as it is freed (`MALLOC_MMAP_THRESHOLD_=65536`), and of one with",
        "glibc's malloc as it is, which keeps some. MiB; *added*: the error of what training adds to the process.",
        "",
    ]
    errors = {"gives back": [_off(row[4]) for row in rows], "as it is": [_off(row[3]) for row in rows]}
    for name, off in errors.items():
        text.append(f"- {name}: median error {statistics.median(map(abs, off)):.1%}, largest {max(off, key=abs):+.1%}")
    text += [
        "",
        "| model | method | checkpointing | process | predicted | gives back | error | added "
        "| predicted | as it is | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family, name, checkpointing, kept, given in rows:
        sizes = [f"{given[key] / mib:.0f}" for key in ("before", "predicted", "measured")]
        added = (given["predicted"] - given["before"]) / (given["measured"] - given["before"]) - 1
        cells = [family, name, "yes" if checkpointing else "no", *sizes, f"{_off(given):+.1%}", f"{added:+.1%}"]
        cells += [f"{kept[key] / mib:.0f}" for key in ("predicted", "measured")] + [f"{_off(kept):+.1%}"]
        text.append(f"| {' | '.join(cells)} |")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {sys.version.split()[0]}"
    head = ["# Predicted and measured memory on a CPU", "", f"`bench/plan.py`, {versions}.", ""]
    return "\n".join([*head, *text]) + "\n"


def _off(row: dict[str, float]) -> float:
    return row["predicted"] / row["measured"] - 1


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    only = ("MODEL", "METHOD", "CHECKPOINTING", "FOLDER")
    parser.add_argument("--only", nargs=4, metavar=only, help="in this process")
    parser.add_argument("--full", action="store_true", help="all architectures, models and ways")
    parser.add_argument("--results", type=Path, help="a Markdown file for the tables")
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(measure(asked.only[0], asked.only[1], asked.only[2] == "1", asked.only[3])))
        return
    text = page(asked.full)
    print(text)
    if asked.results:
        asked.results.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
