"""Merging into a quantized base: the sum stays dense, packing it again is asked for, and all can be undone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from quantized import KINDS, TORCHAO, dense, linears, quantize
from test_quantized import eight_bit, same_tensors, stored
from tiny import logits, perturb, text
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
from typer.testing import CliRunner

import veneer
from veneer.cli.commands import app
from veneer.errors import AdapterError, MethodError, NotMergeable

pytestmark = eight_bit


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = dense().to(dtype)
    for path, module in linears(model).items():
        model.set_submodule(path, quantize(module, kind))
    return model.eval()


def adapted(model: nn.Module, method: veneer.Method | None = None, where: str | None = None) -> veneer.Adapter:
    torch.manual_seed(1)
    adapter = veneer.attach(model, method or veneer.LoRA(rank=4), where)
    perturb(adapter, 0.1)
    return adapter


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    return logits(model, text())


@pytest.mark.parametrize("method", [veneer.LoRA(rank=4), veneer.DoRA(rank=4)], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_adapted_and_comes_back_bit_for_bit(kind, method):
    model = quantized(kind)
    kinds, before = {path: type(module) for path, module in linears(model).items()}, stored(model)
    adapter = adapted(model, method)
    unmerged = answer(model)
    drift = veneer.merge(model, adapter, check=text())
    assert {type(module) for module in linears(model).values()} == {nn.Linear}
    close = 2e-2 if kind == "int8" else 1e-5  # int8 rounds activations too, which a dense weight has no need of
    torch.testing.assert_close(answer(model), unmerged, rtol=close, atol=close)
    assert drift.largest == pytest.approx((answer(model) - unmerged).abs().max().item(), rel=1e-3, abs=1e-7)
    veneer.unmerge(model, adapter)
    assert {path: type(module) for path, module in linears(model).items()} == kinds
    assert torch.equal(answer(model), unmerged)
    veneer.detach(model, adapter)
    same_tensors(stored(model), before)


@pytest.mark.parametrize("kind", TORCHAO)
def test_packing_torchao_again_is_refused_and_nothing_is_touched(kind):
    model = quantized(kind)
    adapter = adapted(model)
    before, unmerged = stored(model), answer(model)
    with pytest.raises(NotMergeable, match="Leave requantize out"):
        veneer.merge(model, adapter, requantize=True)
    same_tensors(stored(model), before)
    assert torch.equal(answer(model), unmerged)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in TORCHAO])
def test_packing_again_costs_more_and_comes_back_too(kind):
    """In bfloat16 as on real models: the sum in 16 bit is far nearer to the unmerged model than packed again."""
    model = quantized(kind, torch.bfloat16)
    kinds, before = {path: type(module) for path, module in linears(model).items()}, stored(model)
    adapter = adapted(model)
    default = veneer.merge(model, adapter, check=text())
    assert {module.weight.dtype for module in linears(model).values()} == {torch.bfloat16}
    veneer.unmerge(model, adapter)
    again = veneer.merge(model, adapter, requantize=True, check=text())
    assert {path: type(module) for path, module in linears(model).items()} == kinds
    assert again.divergence > 2 * default.divergence
    assert again.mean > default.mean
    assert str(again).startswith("logits moved by ")
    other = copy.deepcopy(model)
    veneer.detach(other, "default")
    same_tensors(stored(other), before)
    veneer.detach(model, adapter)
    same_tensors(stored(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_permanent_gives_a_plain_model(kind):
    model = quantized(kind)
    adapter = adapted(model)
    unmerged = answer(model)
    veneer.merge(model, adapter, permanent=True)
    assert list(model.state_dict()) == list(dense().state_dict())
    assert not any(module._forward_hooks for module in model.modules())
    plain = dense()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(answer(plain), answer(model))
    torch.testing.assert_close(answer(model), unmerged, rtol=2e-2, atol=2e-2 if kind == "int8" else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_merge_one_onto_the_other(kind):
    model = quantized(kind)
    before = stored(model)
    adapted(model)
    veneer.attach(model, veneer.LoRA(rank=2), where="attention", name="second")
    perturb(veneer.adapters(model)["second"], 0.1)
    veneer.activate(model, "default", "second")
    veneer.merge(model, "default")
    beside = answer(model)  # the second acts on what is a plain linear by now
    veneer.merge(model, "second")
    torch.testing.assert_close(answer(model), beside, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="merged after"):
        veneer.unmerge(model, "default")
    veneer.unmerge(model, "second")
    veneer.detach(model, "default")
    veneer.detach(model, "second")
    same_tensors(stored(model), before)


def test_one_role_of_a_fused_projection_merges_once():
    """Two claims on one packed weight: it is unpacked once, and packed once."""
    model = quantized("own-nf4")
    adapter = veneer.attach(model, (veneer.LoRA(rank=2), veneer.LoRA(rank=3)), where="mlp")
    perturb(adapter, 0.1)
    unmerged, before = answer(model), stored(model)
    veneer.merge(model, adapter)
    torch.testing.assert_close(answer(model), unmerged, rtol=1e-5, atol=1e-5)
    veneer.unmerge(model, adapter)
    same_tensors(stored(model), before)


@pytest.mark.parametrize("requantize", [False, True])
def test_a_failure_midway_restores_everything(monkeypatch, requantize):
    model = quantized("own-nf4-double")
    adapter = adapted(model)
    before, unmerged = stored(model), answer(model)
    write, calls = veneer.Place.write, []

    def fails(self, weight):
        calls.append(self.path)
        if len(calls) == 4:
            raise KeyboardInterrupt("midway")
        write(self, weight)

    monkeypatch.setattr(veneer.Place, "write", fails)
    with pytest.raises(KeyboardInterrupt, match="midway"):
        veneer.merge(model, adapter, requantize=requantize)
    same_tensors(stored(model), before)
    assert torch.equal(answer(model), unmerged)
    assert adapter.originals == []


def test_an_offloaded_module_is_refused_and_named():
    """accelerate's hooks replace the forward, and know the packed weight."""
    model = quantized("own-nf4")
    adapter = adapted(model)
    before = stored(model)
    module = model.model.layers[1].mlp.up_proj
    module.forward = module.forward
    with pytest.raises(
        NotMergeable, match=r"model\.layers\.1\.mlp\.up_proj: the forward of this NF4Linear was replaced"
    ):
        veneer.merge(model, adapter)
    same_tensors(stored(model), before)


def test_what_merge_refuses():
    model = dense()
    adapter = adapted(model)
    with pytest.raises(AdapterError, match="Nothing that adapter 'default' changes is quantized"):
        veneer.merge(model, adapter, requantize=True)
    with pytest.raises(MethodError, match="LlamaModel does not answer with logits"):
        veneer.merge(model.model, veneer.attach(model.model, veneer.LoRA(), name="inner"), check=text())


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_keeps_the_answers_and_the_adapter(kind):
    model = quantized(kind)
    adapter = adapted(model)
    before = answer(model)
    assert veneer.dequantize(model) is model
    assert {type(module) for module in linears(model).values()} == {nn.Linear}
    close = 2e-2 if kind == "int8" else 1e-5
    torch.testing.assert_close(answer(model), before, rtol=close, atol=close)
    veneer.merge(model, adapter)
    with pytest.raises(AdapterError, match="Adapter 'default' is merged"):
        veneer.dequantize(model)


def test_the_command_line_merges_a_qlora_adapter(tmp_path):
    """Trained beside NF4 weights: the plain folder has the sum, and transformers alone reads it."""
    dense().save_pretrained(tmp_path / "base")
    model = veneer.quantize(LlamaForCausalLM.from_pretrained(tmp_path / "base").eval(), veneer.NF4())
    adapter = adapted(model)
    veneer.save(adapter, tmp_path / "adapter")
    unmerged = answer(model)
    names = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    result = CliRunner().invoke(app, ["merge", *names, "--nf4", "--json"])
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert done["merged_places"] == len(adapter.claims)
    assert done["drift"] is None, "a folder without a tokenizer has nothing to measure with"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(answer(merged), unmerged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_base_that_transformers_quantized_becomes_a_plain_one(bits, tmp_path):
    dense().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(**{f"load_in_{bits}": True})
    load = {"quantization_config": config, "device_map": "cpu", "dtype": torch.float32}
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", **load).eval()
    for module in linears(model).values():
        module.support_avx512bf16_for_cpu = False
    adapter = adapted(model, where="attention.q")
    veneer.merge(model, adapter, permanent=True)
    veneer.dequantize(model)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(answer(plain), answer(model))
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
