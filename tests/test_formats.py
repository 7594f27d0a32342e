"""Bases whose kernels are not run here, or give no gradients: what trains on them, and what is refused by name.

FP8 and MXFP4 are transformers' own classes with a product in plain torch where their kernels, which need a GPU, would
run. HQQ and gptqmodel are real where they are installed, which `scripts/setup` does not do: transformers imports an HQQ
that it finds, which warns (`-o filterwarnings=` runs them), and gptqmodel 7.7 asks for a later torch.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from quantized import dense, linears
from quantized import quantized as packed
from tiny import logits, perturb, text
from torch import nn
from transformers import GptOssConfig
from transformers.integrations import finegrained_fp8
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import veneer
from veneer import formats
from veneer.errors import MethodError, NotMergeable, UnreadableWeight

BESIDE = [veneer.LoRA(rank=2), veneer.VeRA(rank=2), veneer.MiSS(rank=2), veneer.OFT(block_size=8), veneer.IA3()]
"""Methods on activations, which never look at the weight."""
OTHERS = [
    *BESIDE,
    veneer.BottleneckAdapter(width=4),
    veneer.PrefixTuning(length=3),
    veneer.LLaMAAdapter(length=3, layers=2),
]
LOOKING = [veneer.DoRA(rank=2), veneer.HiRA(rank=2), veneer.LoRA(rank=2, init="pissa")]
named = {"ids": lambda method: type(method).__name__}


class Kernel(nn.Module):
    """Stands for gptqmodel's classes, by the name of their common one: buffers, and a product of their own."""

    __module__, __qualname__ = "gptqmodel.nn_modules.qlinear", "BaseQuantLinear"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, linear.out_features, dtype=torch.float32))
        self.hidden = [linear.weight.detach()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.hidden[0].T


class Deaf(Kernel):
    """A kernel without a backward."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Rows(FbgemmFp8Linear):
    """transformers' class with the product that its kernel means, and no backward, as there."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, formats.of(self).read(self, "weight").to(x.dtype))


def rows(linear: nn.Linear) -> nn.Module:
    new = Rows(linear.in_features, linear.out_features, False)
    scale = linear.weight.detach().abs().amax(1, keepdim=True) / 448
    new.weight = nn.Parameter((linear.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
    new.weight_scale = nn.Parameter(scale)
    return new


def blocks(linear: nn.Linear) -> nn.Module:
    new = finegrained_fp8.FP8Linear(linear.in_features, linear.out_features, block_size=(32, 48))
    scales = torch.rand(new.weight_scale_inv.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    new.weight_scale_inv = nn.Parameter(scales)
    new.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return new


def model(make) -> nn.Module:
    found = dense()
    for path, linear in linears(found).items():
        found.set_submodule(path, make(linear))
    return found.eval()


@pytest.fixture
def _fp8_product(monkeypatch):
    """The product of FP8Linear's kernel; its backward, and what decides to take it, stay transformers'."""

    def product(x, weight, scale, block_size, bias, *options):
        return F.linear(x, finegrained_fp8._dequantize_fp8_weight(weight, scale, block_size, x.dtype), bias)

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", product)


MAKERS = {"gptqmodel": Kernel, "fp8": blocks, "fbgemm": rows}


def trains(base: nn.Module, method: veneer.Method) -> None:
    """Every tensor gets the gradient that it gets on the dense twin, and detaching gives the base back."""
    with torch.no_grad():
        before = logits(base, text())
    adapter = veneer.attach(base, method)
    perturb(adapter, 0.1)
    logits(base, text()).pow(2).mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    veneer.detach(base, adapter)
    with torch.no_grad():
        assert torch.equal(logits(base, text()), before)


@pytest.mark.usefixtures("_fp8_product")
@pytest.mark.parametrize("method", OTHERS, **named)
@pytest.mark.parametrize("kind", MAKERS)
def test_methods_on_activations_train(kind, method):
    trains(model(MAKERS[kind]), method)


@pytest.mark.usefixtures("_fp8_product")
@pytest.mark.parametrize("kind", ["fp8", "fbgemm"])
@pytest.mark.parametrize("method", [veneer.LoRA(rank=2), *LOOKING], ids=["LoRA", "DoRA", "HiRA", "PiSSA"])
def test_float8_equals_its_dense_twin(kind, method):
    """Where the numbers can be read every method acts as on them, and merging gives them in 16 bits or more."""
    base, twin = model(MAKERS[kind]), dense()
    for one, other in zip(linears(base).values(), linears(twin).values(), strict=True):
        other.weight.data = formats.of(one).read(one, "weight")
    found = []
    for one in (base, twin):
        torch.manual_seed(1)
        found.append(veneer.attach(one, method))
        perturb(found[-1], 0.1)
        found.append(logits(one, text()))
        found[-1].pow(2).mean().backward()
    adapter, answer, other, expected = found
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(adapter.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert veneer.count_parameters(base) == veneer.count_parameters(twin)
    veneer.merge(base, adapter, permanent=True)
    assert {type(linear) for linear in linears(base).values()} == {nn.Linear}
    with torch.no_grad():
        torch.testing.assert_close(logits(base, text()), answer, rtol=1e-5, atol=1e-5)


def test_float8_is_read_as_transformers_reads_it():
    one = blocks(nn.Linear(100, 70, bias=False))
    theirs = finegrained_fp8._dequantize_fp8_weight(one.weight, one.weight_scale_inv, one.block_size, torch.float32)
    assert torch.equal(formats.of(one).read(one, "weight"), theirs)


@pytest.mark.parametrize("method", LOOKING, **named)
def test_methods_that_look_at_the_weight_are_refused_before_anything_is_changed(method):
    base = model(Kernel)
    hooks = [len(module._forward_hooks) for module in base.modules()]
    with pytest.raises(MethodError, match=r"q_proj: a Kernel lays its weight out .* such as LoRA, IA3") as found:
        veneer.attach(base, method)
    assert type(method).__name__ in str(found.value)
    assert not veneer.adapters(base)
    assert [len(module._forward_hooks) for module in base.modules()] == hooks


def test_merging_into_an_unreadable_weight_is_refused_and_nothing_is_touched():
    base = model(Kernel)
    adapter = veneer.attach(base, veneer.LoRA(rank=2))
    perturb(adapter, 0.1)
    answer = logits(base, text())
    with pytest.raises(NotMergeable, match=r"q_proj: a Kernel lays its weight out"):
        veneer.merge(base, adapter)
    assert torch.equal(logits(base, text()), answer)
    assert issubclass(UnreadableWeight, (MethodError, NotMergeable))


def test_elements_of_buffers_are_counted():
    assert veneer.count_parameters(model(Kernel)).total == veneer.count_parameters(dense()).total


def test_a_kernel_without_gradients_says_so_where_they_would_be_lost():
    base = model(Deaf)
    adapter = veneer.attach(base, veneer.LoRA(rank=2))
    with torch.no_grad():
        logits(base, text())  # what needs no gradient runs
    with pytest.raises(MethodError, match=r"^model\.layers\.0\.self_attn\.\w+: a Deaf gives no gradient to its input"):
        logits(base, text())
    veneer.detach(base, adapter)
    veneer.attach(base, veneer.LoRA(rank=2), where="lm_head")
    logits(base, text()).sum().backward()  # nothing trains below


class Experts(Mxfp4GptOssExperts):
    """transformers' class with some answer; its kernel gives no gradients, either."""

    @torch.no_grad()
    def forward(self, hidden_states, *routing):
        return hidden_states * 2


def test_mxfp4_experts_are_refused_by_name():
    config = GptOssConfig(hidden_size=32, intermediate_size=16, num_local_experts=2)
    base = nn.ModuleDict({"first": nn.Linear(32, 32), "experts": Experts(config)})
    run = lambda: base["experts"](base["first"](torch.ones(1, 32)))  # noqa: E731
    with pytest.raises(MethodError, match=r"experts\.down_proj: MXFP4 experts .*dequantize=True"):
        veneer.attach(base, veneer.LoRA(rank=2), where="experts.down_proj")
    with pytest.raises(MethodError, match=r"stored as torch\.uint8"):
        veneer.attach(base, veneer.FullFineTuning(), where="experts.down_proj")
    assert veneer.count_parameters(base).total == 32 * 33 + 2 * (32 * 32 + 32 + 32 * 16 + 32)
    veneer.attach(base, veneer.LoRA(rank=2), where="first")
    with torch.no_grad():
        assert run().shape == (1, 32)
    with pytest.raises(MethodError, match=r"^experts: a Experts gives no gradient to its input"):
        run()


def test_activations_that_torchao_rounds_let_gradients_through():
    """It rounds x too and has no backward: x gets the gradient of the product with the dequantized weight."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    one = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    quantize_(one, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    alone = x.clone().requires_grad_()
    assert torch.autograd.grad(one(alone).sum(), alone, allow_unused=True) == (None,), "torchao has a backward by now"
    before = one(x)
    adapter = veneer.attach(one, veneer.LoRA(rank=2), where="*")
    x.requires_grad_()
    answer = one(x)
    assert torch.equal(answer.detach(), before)
    answer.sum().backward()
    first, second = (formats.of(linear).read(linear, "weight") for linear in one if isinstance(linear, nn.Linear))
    torch.testing.assert_close(x.grad, (second.sum(0) @ first).expand(3, -1))
    veneer.detach(one, adapter)
    assert not any(module._forward_hooks for module in one.modules())


@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-intx4"])
def test_a_torchao_embedding_is_a_lookup(kind):
    from quantized import TORCHAO
    from torchao.quantization import quantize_

    table = nn.Sequential(nn.Embedding(64, 32))
    quantize_(table, TORCHAO[kind], filter_fn=lambda module, path: isinstance(module, nn.Embedding))
    form, ids = formats.of(table[0]), torch.tensor([[3, 9]])
    if type(table[0].weight) is nn.Parameter:
        pytest.skip("torchao leaves embeddings as they are in this layout")
    assert form.shape(table[0], "weight") == (32, 64)
    assert torch.equal(form.read(table[0], "weight").T[ids], table(ids))
    perturb(veneer.attach(table, veneer.LoRA(rank=2), where="*"))
    table(ids).sum().backward()


def test_a_class_that_reads_a_torchao_weight_itself_is_refused():
    class Mine(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    one = nn.Sequential(packed("torchao-int8").model.layers[0].mlp.up_proj)
    mine = Mine(64, 128, bias=False)
    mine.weight = one[0].weight
    with pytest.raises(MethodError, match="a Mine reads its weight in code of its own, and torchao"):
        veneer.attach(nn.Sequential(mine), veneer.LoRA(rank=2), where="*")


@pytest.mark.parametrize("method", [*BESIDE, *LOOKING], **named)
def test_hqq(method):
    quantize = pytest.importorskip("hqq.core.quantize")
    options = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    make = partial(quantize.HQQLinear, quant_config=options, compute_dtype=torch.float32, device="cpu")
    trains(model(make), method)
    base = model(make)
    adapter = veneer.attach(base, method)
    perturb(adapter, 0.1)
    with torch.no_grad():
        answer = logits(base, text())
        veneer.merge(base, adapter)
        torch.testing.assert_close(logits(base, text()), answer, rtol=1e-5, atol=1e-5)
        veneer.unmerge(base, adapter)
        assert torch.equal(logits(base, text()), answer)


@pytest.mark.parametrize("kind", ["torch.TorchLinear", "torch_awq.AwqTorchLinear"])
def test_gptqmodel(kind):
    """Packed noise in its two kernels of plain torch: gradients and refusals, whatever the numbers are."""
    pytest.importorskip("gptqmodel")
    file, name = kind.split(".")
    linear = vars(import_module(f"gptqmodel.nn_modules.qlinear.{file}"))[name]

    def make(one: nn.Linear) -> nn.Module:
        sizes = {"in_features": one.in_features, "out_features": one.out_features, "bias": False}
        new = linear(bits=4, group_size=64, sym=True, desc_act=False, register_buffers=True, **sizes)
        new.qweight.random_(-(2**31), 2**31 - 1)
        new.scales.fill_(0.01)
        new.post_init()
        return new

    trains(model(make), veneer.LoRA(rank=2))
    with pytest.raises(MethodError, match="lays its weight out"):
        veneer.attach(model(make), veneer.DoRA(rank=2))
