"""Models whose linears are quantized, in every way that runs on a CPU, and the dense twin of each.

Experts are quantized where the way has a form for them: Veneer's own NF4 alone.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from subjects import SUBJECTS
from tiny import FAMILIES as FULL
from tiny import TOKENS, Family, text
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from veneer import formats
from veneer.formats.nf4 import NF4Linear
from veneer.formats.nf4_experts import STACKS, NF4Experts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # both say at import which kernels they do without on a CPU
    import bitsandbytes as bnb
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

WIDTH, INNER = 64, 128
TORCHAO = {
    "torchao-int8": Int8WeightOnlyConfig(set_inductor_config=False),
    "torchao-int4": PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False),
    "torchao-intx4": IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
}
"""int4 in the layout of torch's CPU kernel, which has no backward, and in the one that is made dense to multiply."""
KINDS = ["nf4", "nf4-double", "fp4", "own-nf4", "own-nf4-double", "int8", *TORCHAO]
FAMILIES = {
    name: next(family for family in ("llama", "bert", "mixtral") if family in one.families)
    for name, one in SUBJECTS.items()
}
"""The family that each method meets quantized weights on: some need biases, or experts, which Llama has none of."""


def dense(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "bert":
        return BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=64, **sizes)).eval()
    sizes |= {"vocab_size": 64, "num_key_value_heads": 2, **TOKENS}
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def quantize(linear: nn.Linear, kind: str) -> nn.Linear:
    """A linear as transformers' BitsAndBytesConfig or TorchAoConfig makes it, or as Veneer's own quantize does."""
    if kind in TORCHAO:
        whole = nn.Sequential(linear)
        quantize_(whole, TORCHAO[kind])
        return whole[0]
    if kind.startswith("own"):
        return NF4Linear(linear, block_size=64, double_quant=kind.endswith("double"))
    size, bias = (linear.in_features, linear.out_features), linear.bias
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(*size, bias=bias is not None, has_fp16_weights=False, threshold=6.0)
        new.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        new.bias = bias
        return new.to("cpu")
    name, _, double = kind.partition("-")
    new = bnb.nn.Linear4bit(*size, bias=bias is not None, quant_type=name, compress_statistics=bool(double))
    new.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(), requires_grad=False, quant_type=name, compress_statistics=bool(double), module=new
    )
    new.bias = bias
    new.support_avx512bf16_for_cpu = False  # else it repacks the weight in the first forward, for inference alone
    return new.to("cpu")


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The blocks' linears; the head stays dense, as transformers leaves it."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and (".layers." in path or ".layer." in path) and ".adapters" not in path
    }


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold experts."""
    return {path: module for path, module in model.named_modules() if STACKS[2] in module._parameters}


def quantized(kind: str, family: str = "llama") -> nn.Module:
    model = dense(family)
    for path, module in linears(model).items():
        model.set_submodule(path, quantize(module, kind))
    for path, module in stacks(model).items() if kind.startswith("own") else ():
        model.set_submodule(path, NF4Experts(module, (STACKS[0], STACKS[2]), 64, kind.endswith("double")))
    return model.eval()


def twin(model: nn.Module, family: str = "llama") -> nn.Module:
    """The dense model whose weights are those that the quantized one stands for."""
    other = dense(family)
    for (path, module), stored in zip(linears(other).items(), linears(model).values(), strict=True):
        weight = formats.of(stored).read(stored, "weight")
        assert weight.shape == module.weight.shape, path
        module.weight.data = weight.to(torch.float32)
    for module, stored in zip(stacks(other).values(), stacks(model).values(), strict=True):
        for name in (STACKS[0], STACKS[2]):
            module._parameters[name].data = formats.of(stored).read(stored, name).to(torch.float32)
    return other


@dataclass(frozen=True)
class Base(Family):
    """A family whose linears in the blocks are quantized, in float32."""

    kind: str = ""
    name: str = ""

    def model(self) -> nn.Module:
        """A fresh one, frozen nowhere, in evaluation mode."""
        return quantized(self.kind, self.name)


def base(kind: str, name: str) -> Base:
    """What can be asked of a family holds for it quantized, too."""
    one = FULL[name]
    return Base(one.build, text, one.generates, one.biases, one.pads, one.head, one.extra, kind, name)
