"""The adapters that `check_servers.py` holds servers to: each in a folder, with what it does to its base.

A case's folder has `adapter/`, as it would be served, and beside it `logits`, which the adapted model gives for `IDS`,
`changes` of the base's parameters, where it only changes parameters, and the name of its base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import veneer
from veneer.samples import smollm2

IDS = torch.tensor([[1, 504, 3575, 282, 4649, 314, 216, 33, 9, 700, 31, 12]])
WORDS = 49152
"""In the vocabulary of SmolLM2's tokenizer, with which llama.cpp's converter makes a file of a small base."""
_SIZES = {"vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
BASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "tied": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "biased": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True},
    "classes": {
        "model_type": "llama",
        "architectures": ["LlamaForSequenceClassification"],
        "num_labels": 3,
        "pad_token_id": 0,
    },
    "experts": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    },
}
QV = "attention.q | attention.v"
MIXED = {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"*.layers.0.*": 11.0}}


def base(name: str, folder: Path) -> Path:
    """The folder of a small base with random weights and SmolLM2's tokenizer."""
    from transformers import AutoConfig

    path = folder / "bases" / name
    if not path.exists():
        torch.manual_seed(0)
        fields = {"tie_word_embeddings": False, **_SIZES, **_HEADS, **BASES[name]}
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = _kind(config.architectures[0]).from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(path)
        smollm2.load(smollm2.folder()).tokenizer.save_pretrained(path)
    return path


def load(path: Path) -> nn.Module:
    """A base in float32."""
    config = json.loads((path / "config.json").read_text())
    model: nn.Module = _kind(config["architectures"][0]).from_pretrained(path, dtype=torch.float32).eval()
    return model


def _kind(architecture: str) -> Any:
    return AutoModelForSequenceClassification if "Classification" in architecture else AutoModelForCausalLM


@torch.no_grad()
def by_veneer(base: Path, folder: Path, method: Any, where: str | None = None, **options: Any) -> dict[str, Tensor]:
    """Save an adapter with Veneer, or export it where there are options for that; the changes of parameters."""
    model = load(base)
    adapter = veneer.attach(model, method, where, also_train=options.pop("also_train", ()))
    _move(dict(adapter.named_parameters()))
    if options:
        veneer.export(model, adapter, folder / "adapter", **options)
        model = load(base)
        adapter = veneer.load(model, folder / "adapter")
    else:
        veneer.save(adapter, folder / "adapter")
    _save_logits(model, folder)
    before = {key: value.clone() for key, value in model.state_dict().items() if "adapters." not in key}
    try:
        veneer.merge(model, adapter, permanent=True)
    except veneer.errors.NotMergeable:
        return {}
    after = model.state_dict()
    return {key: after[key] - value for key, value in before.items()}


@torch.no_grad()
def by_peft(base: Path, folder: Path, **fields: Any) -> dict[str, Tensor]:
    """Save an adapter with PEFT; the changes of parameters from the base as it was."""
    model = load(base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fields = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**fields))
    _move({name: one for name, one in adapted.named_parameters() if one.requires_grad})
    adapted.save_pretrained(folder / "adapter")
    _save_logits(adapted.eval(), folder)
    try:
        after = adapted.merge_and_unload().state_dict()
    except NotImplementedError:
        return {}
    return {key: after[key] - value for key, value in before.items()} if after.keys() == before.keys() else {}


def _save_logits(model: nn.Module, folder: Path) -> None:
    save_file({"ids": IDS, "logits": model(IDS).logits.contiguous()}, folder / "logits.safetensors")


def _move(parameters: Mapping[str, Tensor]) -> None:
    """Moves that show in the outputs and do not drown them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


LoRA = veneer.LoRA
CASES: dict[str, tuple[str, Callable[..., dict[str, Tensor]]]] = {
    "LoRA, all linears": ("llama", partial(by_veneer, method=LoRA())),
    "LoRA, q and v": ("llama", partial(by_veneer, method=LoRA(), where=QV)),
    "LoRA, q alone": ("llama", partial(by_veneer, method=LoRA(), where="attention.q")),
    "LoRA, q and k": ("llama", partial(by_veneer, method=LoRA(), where="attention.q | attention.k")),
    "LoRA, k and v": ("llama", partial(by_veneer, method=LoRA(), where="attention.k | attention.v")),
    "LoRA, o and down": ("llama", partial(by_veneer, method=LoRA(), where="attention.o | mlp.down")),
    "LoRA, gate alone": ("llama", partial(by_veneer, method=LoRA(), where="mlp.gate")),
    "LoRA, up alone": ("llama", partial(by_veneer, method=LoRA(), where="mlp.up")),
    "LoRA, one block": ("llama", partial(by_veneer, method=LoRA(), where="*.layers.1.*_proj")),
    "LoRA, embedding": ("llama", partial(by_veneer, method=LoRA(), where=f"{QV} | embedding")),
    "LoRA, embedding that is the head too": ("tied", partial(by_veneer, method=LoRA(), where=f"{QV} | embedding")),
    "LoRA, head": ("llama", partial(by_veneer, method=LoRA(), where=f"{QV} | head")),
    "LoRA, head that is the embedding too": ("tied", partial(by_veneer, method=LoRA(), where=f"{QV} | head")),
    "LoRA, rank 17": ("llama", partial(by_veneer, method=LoRA(rank=17), where=QV)),
    "LoRA, rank 513": ("llama", partial(by_veneer, method=LoRA(rank=513), where=QV)),
    "rsLoRA": ("llama", partial(by_veneer, method=LoRA(use_rslora=True), where=QV)),
    "rsLoRA, --pad-rank": ("llama", partial(by_veneer, method=LoRA(use_rslora=True), where=QV, pad_rank=True)),
    "other ranks": ("llama", partial(by_veneer, method=LoRA(rank_pattern=MIXED["rank_pattern"]), where=QV)),
    "other alphas": ("llama", partial(by_veneer, method=LoRA(alpha_pattern=MIXED["alpha_pattern"]), where=QV)),
    "other ranks and alphas": ("llama", partial(by_veneer, method=LoRA(**MIXED), where=QV)),
    "the same, --pad-rank": ("llama", partial(by_veneer, method=LoRA(**MIXED), where=QV, pad_rank=True)),
    "PiSSA": ("llama", partial(by_veneer, method=LoRA(init="pissa"), where=QV)),
    "DoRA": ("llama", partial(by_veneer, method=veneer.DoRA(), where=QV)),
    "DoRA, --lora-rank 16": ("llama", partial(by_veneer, method=veneer.DoRA(), where=QV, lora_rank=16)),
    "VeRA": ("llama", partial(by_veneer, method=veneer.VeRA(), where=QV)),
    "IA3": ("llama", partial(by_veneer, method=veneer.IA3())),
    "prefix": ("llama", partial(by_veneer, method=veneer.PrefixTuning(length=4))),
    "bottleneck": ("llama", partial(by_veneer, method=veneer.BottleneckAdapter(width=4))),
    "head trained whole": ("llama", partial(by_veneer, method=LoRA(), where=QV, also_train=["lm_head"])),
    "the same, --drop-whole": (
        "llama",
        partial(by_veneer, method=LoRA(), where=QV, also_train=["lm_head"], drop_whole=True),
    ),
    "embedding trained whole": (
        "llama",
        partial(by_veneer, method=LoRA(), where=QV, also_train=["model.embed_tokens"]),
    ),
    "norms in blocks trained whole": (
        "llama",
        partial(by_veneer, method=LoRA(), where=QV, also_train=["input_layernorm"]),
    ),
    "last norm trained whole": ("llama", partial(by_veneer, method=LoRA(), where=QV, also_train=["model.norm"])),
    "biases": ("biased", partial(by_veneer, method=LoRA(bias="lora_only"), where=QV)),
    "classes' head trained whole": ("classes", partial(by_veneer, method=LoRA(), where=QV, also_train=["score"])),
    "experts": ("experts", partial(by_veneer, method=LoRA(), where=f"{QV} | *.experts")),
    "one stack of experts": ("experts", partial(by_veneer, method=LoRA(), where=f"{QV} | *.experts.down_proj")),
    "PEFT: PiSSA as it is": ("llama", partial(by_peft, init_lora_weights="pissa")),
    "PEFT: OLoRA as it is": ("llama", partial(by_peft, init_lora_weights="olora")),
    "PEFT: PiSSA by a quick SVD as it is": ("llama", partial(by_peft, init_lora_weights="pissa_niter_4")),
    "PEFT: gaussian start": ("llama", partial(by_peft, init_lora_weights="gaussian")),
    "PEFT: lora_bias": ("biased", partial(by_peft, lora_bias=True)),
    "PEFT: alora_invocation_tokens": ("llama", partial(by_peft, alora_invocation_tokens=[314, 216])),
    "PEFT: layer_replication": ("llama", partial(by_peft, layer_replication=[[0, 2], [1, 2]])),
    "PEFT: trainable_token_indices": ("llama", partial(by_peft, trainable_token_indices=[3, 5])),
    "PEFT: targets by a regular expression": ("llama", partial(by_peft, target_modules=r".*\.(q|v)_proj")),
}


def write(folder: Path) -> None:
    """Write every case that is not there yet into a folder of its name, with its name and base."""
    for name, (kind, make) in CASES.items():
        path = folder / "cases" / re.sub(r"\W+", "-", name)
        if (path / "case.json").exists():
            continue
        path.mkdir(parents=True)
        changes = make(base(kind, folder), path)
        save_file({key: value.contiguous() for key, value in changes.items()}, path / "changes.safetensors")
        (path / "case.json").write_text(json.dumps({"name": name, "base": kind}))


def meant(name: str, server: str) -> bool:
    """Whether a case is for a server: llama.cpp's own program, not its library, waits for aLoRA's tokens, its converter
    has no classifiers, and nothing can be compared of a changed tied embedding but outputs."""
    if server == "llama.cpp":
        return "classes" not in name and "alora" not in name and name != "bottleneck"
    return server == "peft" or "too" not in name
