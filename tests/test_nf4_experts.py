"""Experts in NF4: their bytes, every law on them, what stays dense, merging, folders, and what a step keeps."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_experts import BUILD, WHERE, answer
from test_experts import moe as dense
from tiny import logits, perturb, text
from torch import nn

import veneer
from veneer import formats
from veneer.formats.nf4_storage import Holder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # bitsandbytes says at import which kernels it does without on a CPU

PATH = "model.layers.1.mlp.experts"
STACKS = ("gate_up_proj", "down_proj")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def moe(kind: str = "mixtral", dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    return veneer.quantize(dense(kind, "eager", dtype), veneer.NF4(**options))


def twin(model: nn.Module, kind: str, way: str = "eager") -> nn.Module:
    """The dense model with the weights that a quantized one stands for, computed in one of transformers' ways."""
    other = dense(kind, way, torch.float32)
    for path, module in model.named_modules():
        form = formats.of(module)
        for _, name in form.weights(module) if isinstance(module, Holder) else ():
            plain = other.get_submodule(path)
            formats.of(plain).write(plain, name, form.read(module, name))
    return other


def adapted(model: nn.Module, method: veneer.Method | None = None, where: str = WHERE) -> veneer.Adapter:
    torch.manual_seed(1)
    adapter = veneer.attach(model, method or veneer.LoRA(rank=2, alpha=4.0), where)
    perturb(adapter, 0.1)
    return adapter


def gradients(model: nn.Module, adapter: veneer.Adapter) -> list[torch.Tensor]:
    model.zero_grad()
    logits(model, text()).pow(2).mean().backward()
    return [parameter.grad.clone() for parameter in adapter.parameters()]


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", BUILD)
def test_it_computes_what_transformers_computes(kind, way):
    """The base, and the gradients that pass it, as each of transformers' ways has them on the same numbers."""
    model = moe(kind)
    other = twin(model, kind, way)
    torch.testing.assert_close(answer(model), answer(other), **CLOSE)
    grads = [gradients(one, adapted(one, where="attention.q")) for one in (model, other)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-8)


METHODS = {
    "LoRA": veneer.LoRA(rank=2),
    "PiSSA": veneer.LoRA(rank=2, init="pissa"),
    "LoRAFA": veneer.LoRAFA(rank=2),
    "HiRA": veneer.HiRA(rank=2),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", BUILD)
def test_a_method_computes_what_it_computes_on_the_dense_twin(kind, name):
    """Low-rank changes beside the stacks, others inside them; PiSSA's factors are two parts of one pair."""
    model = moe(kind)
    other = twin(model, kind)
    adapters = [adapted(one, METHODS[name]) for one in (model, other)]
    torch.testing.assert_close(answer(model), answer(other), **CLOSE)
    grads = [gradients(one, adapter) for one, adapter in zip((model, other), adapters, strict=True)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)
