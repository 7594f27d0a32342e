"""Small models with random weights, one of each family, and the real ALBERT; all in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

WIDTH, HEADS, VOCABULARY = 32, 4, 64
IDS = torch.tensor([[5, 9, 12, 33, 7, 21], [40, 8, 11, 3, 60, 17], [22, 6, 30, 14, 2, 51]])


SIZES = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}
_SIDE = {"layers": 2, "attention_heads": HEADS, "ffn_dim": 48}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **SIZES, **TOKENS))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=HEADS, **TOKENS)
    )


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **SIZES))


def t5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": HEADS}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, feed_forward_proj="gated-gelu", decoder_start_token_id=0, **sizes)
    )


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=5, **SIZES))


def gemma3() -> nn.Module:
    """Norms around each branch and on q and k, attention in windows of 4 and over all, a tied head."""
    sizes = {"head_dim": 8, "query_pre_attn_scalar": 8, "num_key_value_heads": 2, **SIZES}
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=VOCABULARY, **sizes, **windows, **TOKENS))


def whisper() -> nn.Module:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _SIDE.items()}
    lengths = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 64}
    return WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=VOCABULARY, d_model=WIDTH, decoder_start_token_id=1, **sides, **lengths, **TOKENS)
    )


def mixtral() -> nn.Module:
    """Experts in three dimensions; of the ways to compute them, one that takes float64 and compiles in one graph."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **experts, **SIZES, **TOKENS))


def albert() -> nn.Module:
    from veneer.samples import albert as sample

    return sample.load()


def text(rows: Tensor = IDS) -> dict[str, Tensor]:
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def pixels(rows: Tensor = IDS) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(len(rows), 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()}


def sound(rows: Tensor = IDS) -> dict[str, Tensor]:
    features = torch.randn(len(rows), 8, 16, generator=torch.Generator().manual_seed(1)).double()
    return {"input_features": features, "decoder_input_ids": rows[:, :4]}


def text_to_text(rows: Tensor = IDS) -> dict[str, Tensor]:
    return {**text(rows), "decoder_input_ids": rows[:, :4]}


@dataclass(frozen=True)
class Family:
    """How to build a model and a batch, and what can be asked of it."""

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]] = text
    generates: bool = False
    biases: bool = True
    pads: str = "left right"
    head: str = "lm_head"
    extra: dict[str, str] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """A fresh copy, frozen nowhere, in evaluation mode."""
        return copy.deepcopy(_built(self.build))


@functools.cache
def _built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero biases would hide mistakes
            torch.nn.init.normal_(parameter, std=0.1)
    return model


FAMILIES = {
    "llama": Family(llama, generates=True, biases=False),
    "gpt2": Family(gpt2, generates=True),
    "bert": Family(bert, head="cls.predictions.transform"),
    "t5": Family(t5, text_to_text, generates=True),
    "vit": Family(vit, pixels, pads="", head="classifier"),
    "albert": Family(albert, head="predictions.dense"),
    "gemma3": Family(gemma3, generates=True, biases=False),
    "whisper": Family(whisper, sound, generates=True, pads="", head="proj_out"),
    "mixtral": Family(mixtral, generates=True, biases=False),
}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's answer to a batch."""
    return model(**batch).logits


def perturb(adapter, scale: float = 0.2) -> None:
    """Give every adapter parameter, and what a fusion is made of, a value that is not its start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        parts = [tensor for key, tensor in adapter.named_tensors() if ".parts." in key]
        for parameter in (*adapter.parameters(), *parts):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype), alpha=scale)
