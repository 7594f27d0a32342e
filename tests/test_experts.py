"""LoRA on stacks of experts: what it changes, what it costs, how it is started, merged, written and restricted."""

from __future__ import annotations

import pytest
import torch
from tiny import SIZES, TOKENS, logits, perturb, text
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import veneer
from veneer import formats, layers, places

EXPERTS, INNER = 4, 24
COMMON = {"vocab_size": 64, "num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "head_dim": 8}
BUILD = {
    "mixtral": lambda way: MixtralForCausalLM(MixtralConfig(experts_implementation=way, **COMMON, **SIZES, **TOKENS)),
    "qwen3_moe": lambda way: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(experts_implementation=way, **COMMON | QWEN, **SIZES, **TOKENS)
    ),
    "gpt_oss": lambda way: GptOssForCausalLM(
        GptOssConfig(experts_implementation=way, head_dim=8, **COMMON, **SIZES, **TOKENS)
    ),
}
WHERE = "*.experts"


def moe(kind: str, way: str = "eager", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = BUILD[kind](way).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")) or "experts" in name:  # gpt_oss leaves some of these as they come
            nn.init.normal_(parameter, std=0.1)
    return model


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return logits(model, text())


def attached(kind: str, where: str = WHERE, way: str = "eager", dtype: torch.dtype = torch.float64):
    model = moe(kind, way, dtype)
    torch.manual_seed(1)
    return model, veneer.attach(model, veneer.LoRA(rank=2, alpha=4.0), where)


@pytest.mark.parametrize("kind", BUILD)
def test_the_answer_is_that_of_the_changed_experts(kind):
    """Each expert's own weight plus its own s·B·A, written into a model by hand."""
    model, adapter = attached(kind)
    perturb(adapter)
    other = moe(kind)
    for claim in adapter.claims:
        parameter = other.get_parameter(claim.place.path)
        for expert in range(EXPERTS):
            change = 2.0 * claim.delta.B[expert] @ claim.delta.A[expert]
            parameter.data[expert] += change.T if kind == "gpt_oss" else change
    torch.testing.assert_close(answer(model), answer(other), rtol=1e-10, atol=1e-10)
    assert (answer(model) - answer(moe(kind))).abs().max() > 1e-3


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_every_way_to_compute_experts_reads_the_change(kind, way):
    answers = []
    for implementation in ("eager", way):
        model, adapter = attached(kind, way=implementation, dtype=torch.float32)
        perturb(adapter)
        logits(model, text()).pow(2).mean().backward()
        answers.append((answer(model), [parameter.grad for parameter in adapter.parameters()]))
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-5)


def test_parameters_are_counted():
    _, adapter = attached("qwen3_moe")
    width = SIZES["hidden_size"]
    one_layer = EXPERTS * 2 * (width + 2 * INNER) + EXPERTS * 2 * (INNER + width)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 2 * one_layer


def test_linear_stays_the_linears():
    found = places.find(moe("mixtral"), "linear", "weight")
    assert len(found) == 8
    assert all("self_attn" in place.path for place in found)


@pytest.mark.parametrize("where", ["gate_up_proj", "*.experts.down_proj", r"re:.*experts\.down_proj"])
def test_globs_name_one_of_the_two(where):
    _, adapter = attached("gpt_oss", where)
    assert {claim.place.parameter for claim in adapter.claims} == {where.rpartition(".")[2]}


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_each_expert_starts_as_a_layer_of_its_own(init):
    model = moe("mixtral")
    adapter = veneer.attach(model, veneer.LoRA(rank=4, init=init), "*.down_proj")
    for claim in adapter.claims:
        assert claim.delta.A.shape == (EXPERTS, 4, SIZES["intermediate_size"])
        assert not claim.delta.B.any()
        for A in claim.delta.A:
            if init == "orthogonal":
                torch.testing.assert_close(A @ A.T, torch.eye(4, dtype=A.dtype))
            else:
                spread = 1 / (3 * SIZES["intermediate_size"]) ** 0.5 if init == "kaiming" else 1 / 4
                assert 0.7 * spread < A.std() < 1.3 * spread


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("role", ["gate", "up"])
def test_a_role_of_the_fused_outputs_leaves_the_other_alone(kind, role):
    """gate and up one after the other, or in turns."""
    model = moe(kind)
    path = "model.layers.1.mlp.experts.gate_up_proj"
    out = places.weights(model)[path].shape[1]
    first = role == "up"
    if kind == "gpt_oss":
        spans = tuple((row, row + 1) for row in range(int(first), out, 2))
    else:
        spans = ((out // 2 * first, out // 2 * (1 + first)),)
    rows = [row for start, stop in spans for row in range(start, stop)]
    (place,) = places.exact(model, "weight", [(f"{path}[{role}]", spans)])
    assert place.shape == (EXPERTS, out // 2, SIZES["hidden_size"])
    stored = model.get_parameter(path).detach().clone()
    adapter = attach_at(model, place)
    perturb(adapter)
    adapted = answer(model)
    veneer.merge(model, adapter, permanent=True)
    torch.testing.assert_close(answer(model), adapted, rtol=1e-9, atol=1e-9)
    moved = (model.get_parameter(path) - stored).abs().amax(dim=(0, 1) if kind == "gpt_oss" else (0, 2))
    assert moved[rows].min() > 0
    assert moved.count_nonzero() == len(rows)


def attach_at(model: nn.Module, place: veneer.Place) -> veneer.Adapter:
    from veneer.adapter import build, install

    return install(model, "default", build(veneer.LoRA(rank=2), [place], "by hand"))


@pytest.mark.parametrize("kind", BUILD)
def test_merged_experts_are_saved_and_loaded_again_exactly(kind, tmp_path):
    """transformers writes some of these models with one file entry an expert, and joins them as it reads."""
    model, adapter = attached(kind, f"{WHERE} | self_attn.q_proj")
    perturb(adapter)
    veneer.merge(model, adapter, permanent=True)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager").eval()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
    # the same weights elsewhere in memory may be summed in another order
    torch.testing.assert_close(answer(model), answer(other), rtol=1e-12, atol=1e-12)


def test_a_stack_acts_on_activations_as_its_product():
    torch.manual_seed(0)
    A, B, x = torch.randn(3, 2, 5), torch.randn(3, 4, 2), torch.randn(3, 7, 5)
    stack = layers.Stack()
    torch.testing.assert_close(stack.up(stack.down(x, A), B), torch.bmm(x, stack.product(A, B).mT))


@pytest.mark.parametrize("kind", BUILD)
def test_reading_and_writing_keep_the_layout(kind):
    module = moe(kind).get_submodule("model.layers.0.mlp.experts")
    form, before = formats.of(module), module.down_proj.detach().clone()
    read = form.read(module, "down_proj").clone()
    assert read.shape == form.shape(module, "down_proj") == (EXPERTS, SIZES["hidden_size"], read.shape[-1])
    form.write(module, "down_proj", read + 1)
    torch.testing.assert_close(module.down_proj, before + 1)


def test_biases_beside_the_experts_are_trained_with_them():
    model = moe("gpt_oss")
    adapter = veneer.attach(model, veneer.LoRA(rank=2, bias="lora_only"), "*.down_proj")
    trained = {claim.place.path for claim in adapter.claims if isinstance(claim.method, veneer.FullFineTuning)}
    assert trained == {f"model.layers.{i}.mlp.experts.down_proj_bias" for i in range(2)}
    with pytest.raises(veneer.errors.MethodError, match="no adapted layer has a bias"):
        veneer.attach(moe("mixtral"), veneer.LoRA(rank=2, bias="lora_only"), "*.down_proj")


def test_what_needs_a_called_layer_is_refused():
    from ports import InputScale

    with pytest.raises(veneer.errors.MethodError, match=r"InputScale at .*experts\.gate_up_proj: .*without a call"):
        veneer.attach(moe("mixtral"), InputScale(), WHERE)
    with pytest.raises(veneer.errors.MethodError, match="dropout"):
        veneer.attach(moe("mixtral"), veneer.LoRA(rank=2, dropout=0.1), WHERE)
