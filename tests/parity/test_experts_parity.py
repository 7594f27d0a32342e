"""LoRA on stacks of experts computes what PEFT's `target_parameters` compute, and either reads the other's files."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from test_experts import BUILD, EXPERTS, answer, moe
from tiny import logits, perturb, text

import veneer

with warnings.catch_warnings():
    # peft imports every quantizer it finds, and some of those warn at import that they lack a kernel or a compiler
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
ONE = ["experts.down_proj"]
BOTH = ["experts.down_proj", "experts.gate_up_proj"]


def in_peft(kind, parameters, modules=(), **options):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(modules), target_parameters=parameters, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(moe(kind), config).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = parameter.data.to(torch.float64) + 0.2 * noise
    return wrapped


def opened_by_peft(kind, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(moe(kind), folder, is_trainable=True).eval()


def gradients(model, parameters):
    logits(model, text()).pow(2).mean().backward()
    return {key: parameter.grad for key, parameter in parameters}


def same_gradients(adapter, wrapped):
    """Ours, written as PEFT writes parameters, are those of PEFT's parameters."""
    from veneer.interop import peft as files

    ours = gradients(adapter.model, adapter.named_parameters())
    theirs = gradients(wrapped, ((k, p) for k, p in wrapped.named_parameters() if p.requires_grad))
    for key, parameter in adapter.named_parameters():
        parameter.data = ours[key]
    written = files.to_tensors(adapter.claims)
    found = {key.replace(".default.", "."): gradient for key, gradient in theirs.items()}
    assert written.keys() == found.keys()
    for key, gradient in written.items():
        torch.testing.assert_close(gradient, found[key], **EXACT, msg=lambda words, key=key: f"{key}: {words}")


@pytest.mark.parametrize("parameters", [ONE, BOTH], ids=["one", "both"])
@pytest.mark.parametrize("kind", BUILD)
def test_we_open_what_peft_wrote(kind, parameters, tmp_path):
    wrapped = in_peft(kind, parameters, modules=["q_proj"])
    wrapped.save_pretrained(tmp_path)
    model = moe(kind)
    adapter = veneer.load(model, tmp_path)
    assert len(adapter.claims) == 2 * (1 + len(parameters))
    torch.testing.assert_close(answer(model), answer(wrapped), **EXACT)
    assert (answer(model) - answer(moe(kind))).abs().max() > 1e-3
    same_gradients(adapter, wrapped)


@pytest.mark.parametrize("where", ["down_proj", "*.experts", "*.experts | q_proj"])
@pytest.mark.parametrize("kind", BUILD)
def test_peft_opens_what_we_wrote(kind, where, tmp_path):
    model = moe(kind)
    adapter = veneer.attach(model, veneer.LoRA(rank=2, rank_pattern={"down_proj": 3}), where)
    perturb(adapter)
    veneer.save(adapter, tmp_path)
    wrapped = opened_by_peft(kind, tmp_path)
    torch.testing.assert_close(answer(wrapped), answer(model), **EXACT)
    again = moe(kind)
    veneer.load(again, tmp_path)
    assert torch.equal(answer(again), answer(model))
    same_gradients(adapter, wrapped)


@pytest.mark.parametrize("kind", BUILD)
def test_a_role_of_the_fused_outputs_goes_to_peft(kind, tmp_path):
    from veneer import places
    from veneer.adapter import build, install

    model = moe(kind)
    path = "model.layers.0.mlp.experts.gate_up_proj"
    out = places.weights(model)[path].shape[1]
    halves = [(f"{path}[gate]", ((0, out // 2),)), (f"{path}[up]", ((out // 2, out),))]
    found = places.exact(model, "weight", halves)
    adapter = install(model, "default", build(veneer.LoRA(rank=2), found, "by hand"))
    perturb(adapter)
    veneer.save(adapter, tmp_path)
    torch.testing.assert_close(answer(opened_by_peft(kind, tmp_path)), answer(model), **EXACT)
    again = moe(kind)
    veneer.load(again, tmp_path)
    torch.testing.assert_close(answer(again), answer(model), **EXACT)


def test_experts_lie_as_peft_lays_them(tmp_path):
    model = moe("mixtral")
    adapter = veneer.attach(model, veneer.LoRA(rank=2), "*.experts")
    perturb(adapter)
    from veneer.interop import peft as files

    tensors = files.to_tensors(adapter.claims)
    delta = {claim.place.path: claim.delta for claim in adapter.claims}["model.layers.0.mlp.experts.gate_up_proj"]
    stem = "base_model.model.model.layers.0.mlp.experts.base_layer"
    A, B = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
    assert A.shape == (EXPERTS * 2, delta.A.shape[2])
    for expert in range(EXPERTS):
        assert torch.equal(A[2 * expert : 2 * expert + 2], delta.A[expert])
        assert torch.equal(B[:, expert::EXPERTS], delta.B[expert])


def test_a_file_that_lost_a_parameter_is_damaged(tmp_path):
    in_peft("mixtral", ONE).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_parameters"] = BOTH
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(veneer.errors.CorruptFile, match=r"experts\.gate_up_proj.*tensors are missing"):
        veneer.load(moe("mixtral"), tmp_path)
