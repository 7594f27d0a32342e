"""SmolLM2-135M-Instruct with a trained LoRA in llama.cpp, beside transformers with Veneer; prints a table.

    python scripts/server_smollm2.py SOURCES

SOURCES is llama.cpp's folder with its converters. The bases are the package's GGUF file in Q4_1, and what llama.cpp's
converter makes of the transformers folder, in float32; what they differ by without an adapter is the measure for what
they differ by with one. A greedy token counts as the same where both give it the largest logit after the same tokens.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, f"{sys.argv[1]}/gguf-py")  # llama.cpp's own gguf, which its converters need
sys.path.insert(0, sys.argv[1])

import numpy
import torch
from server_llama_cpp import Model, Refused, base_file

import veneer
from veneer.interop import gguf
from veneer.samples import packages, smollm2

TEXT = "And the earth was without form, and void; and darkness was upon the face of the deep."
PROMPT = "In the beginning God created the heaven"
STEPS, TOKENS = 12, 24


def trained() -> tuple[Any, Any, veneer.Adapter]:
    """The model in float32 with a LoRA that knows a sentence, and its tokenizer."""
    torch.manual_seed(0)
    chat = smollm2.load(smollm2.folder(), dtype=torch.float32)
    adapter = veneer.attach(chat.model, veneer.LoRA(rank=8, alpha=16.0))
    ids = chat.tokenizer(f"{PROMPT} and the earth. {TEXT}", return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(list(adapter.parameters()), lr=2e-3)
    for _ in range(STEPS):
        chat.model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return chat.model.eval(), chat.tokenizer, adapter


@torch.no_grad()
def computed(model: Any, prompt: torch.Tensor) -> tuple[list[int], numpy.ndarray]:
    """Prompt and greedy answer, and the logits of each position."""
    ids = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    return ids[0].tolist(), model(ids).logits[0].numpy()


def row(name: str, file: Path, adapter: Path | None, ids: list[int], expected: numpy.ndarray) -> None:
    """A line of the table: llama.cpp beside what transformers gave."""
    seen = Model(file, adapter).logits(ids)
    apart = numpy.abs(seen - expected)
    log = [one - one.max(-1, keepdims=True) for one in (expected.astype("float64"), seen.astype("float64"))]
    log = [one - numpy.log(numpy.exp(one).sum(-1, keepdims=True)) for one in log]
    kl = float((numpy.exp(log[0]) * (log[0] - log[1])).sum(-1).mean())
    same = int((seen.argmax(-1) == expected.argmax(-1))[-TOKENS - 1 : -1].sum())
    print(f"| {name} | {apart.max():.2e} | {apart.mean():.2e} | {kl:.1e} | {same} of {TOKENS} |", flush=True)


def main(sources: Path) -> None:
    """Train, export, compare."""
    model, tokenizer, adapter = trained()
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    with veneer.use(model):
        plain = computed(model, prompt)
    adapted = computed(model, prompt)
    print(f"Without: {tokenizer.decode(plain[0])!r}\n\nWith: {tokenizer.decode(adapted[0])!r}\n")
    with tempfile.TemporaryDirectory() as folder:
        lora = veneer.export(model, adapter, Path(folder) / "lora", to="gguf-lora").folder / gguf.FILE
        wide = base_file(sources, smollm2.folder(), Path(folder) / "base.gguf")
        narrow = packages.file(smollm2.PACKAGE, smollm2.GGUF)
        print("| llama.cpp's base, adapter | logits apart, at most | in the mean | KL | same greedy tokens |")
        print("|---|---:|---:|---:|---:|")
        row("float32, none", wide, None, *plain)
        row("float32, LoRA", wide, lora, *adapted)
        row("Q4_1, none", narrow, None, *plain)
        row("Q4_1, LoRA", narrow, lora, *adapted)
        row("float32, none, beside the adapted", wide, None, *adapted)
        wrong = Path(folder) / "wrong.gguf"
        key = "base_model.model.model.layers.30.self_attn.q_proj.lora_"
        A, B = torch.zeros(8, 576), torch.zeros(576, 8)
        config = model.config.to_dict() | {"num_hidden_layers": 31}
        lora_config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
        gguf.write(wrong, config, {f"{key}A.weight": A, f"{key}B.weight": B}, lora_config)
        try:
            Model(narrow, wrong)
        except Refused as error:
            print(f"\nAn adapter of a tensor that the base lacks: refused, {error}")
        merged = veneer.export(model, adapter, Path(folder) / "merged", to="merged").folder
        print()
        row("float32, `--to merged`", base_file(sources, merged, Path(folder) / "merged.gguf"), None, *adapted)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
