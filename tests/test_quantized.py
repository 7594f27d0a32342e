"""Law 15: an adapter on a quantized base computes what it computes on the dense weights that the base stands for."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from laws import equal
from quantized import FAMILIES, INNER, KINDS, TORCHAO, dense, linears, quantize, quantized, twin
from subjects import SUBJECTS
from tiny import IDS, logits, perturb, text
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig

import veneer
from veneer import formats
from veneer.errors import MethodError, PlaceError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # bitsandbytes says at import which kernels it does without on a CPU
    import bitsandbytes as bnb

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Float32: the quantized product may be summed in another order than the dense one."""
# bitsandbytes computes 8-bit products in float16 and says so at every call on float32 activations
eight_bit = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for key, tensor in one.items():
        assert equal(tensor, other[key]), key


def backward(model: nn.Module) -> torch.Tensor:
    answer = logits(model, text())
    answer.pow(2).mean().backward()
    return answer.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_in_their_own_shape(kind):
    original = linears(dense())
    for path, module in linears(quantized(kind)).items():
        form, weight = formats.of(module), original[path].weight.detach()
        read = form.read(module, "weight")
        assert form.shape(module, "weight") == tuple(weight.shape) == tuple(read.shape)
        assert form.count(module, "weight") == weight.numel()
        error = (read.float() - weight).abs().max() / weight.abs().max()
        assert 0 < error < (0.01 if kind.endswith("int8") else 0.25), path


@eight_bit
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_reads_the_same_weights(kind):
    """The layer's own answer to the unit vectors is its weight."""
    module = linears(quantized(kind))["model.layers.0.mlp.down_proj"]
    before = formats.of(module).read(module, "weight").float()
    with torch.no_grad():
        answer = module(torch.eye(INNER)).T
    read = formats.of(module).read(module, "weight").float()
    assert torch.equal(read, before), "the first forward moved what the weight is read from"
    # int8 rounds the activations too, and rounds its answer to float16
    torch.testing.assert_close(answer.float(), read, rtol=0, atol=1e-3 if kind == "int8" else 1e-7)


@pytest.mark.parametrize("where", ["attention.q | attention.v", "attention.o | mlp", "block", "embedding | head"])
@pytest.mark.parametrize("kind", KINDS)
def test_roles_are_those_of_the_dense_model(kind, where):
    """QLoRA's usual call: roles on a model that was loaded quantized."""
    found = [
        [claim.place.path for claim in veneer.attach(model, veneer.LoRA(), where).claims]
        for model in (quantized(kind), dense())
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_equals_its_dense_twin(kind, name):
    """On a quantized base an adapter computes what it computes on the dense weights that the base stands for."""
    subject, family = SUBJECTS[name], FAMILIES[name]
    stated = subject.stated("a_quantized_base_equals_its_dense_twin", family)
    model = quantized(kind, family)
    if stated is not None:
        with pytest.raises(stated[0], match=stated[1]):
            veneer.attach(model, subject.method, subject.where)
        assert not veneer.adapters(model)
        return
    other = twin(model, family)
    with torch.no_grad():
        base = logits(model, text())
    adapters = []
    for one in (model, other):
        torch.manual_seed(1)
        adapters.append(veneer.attach(one, subject.method, subject.where))
        if waits := any(claim.delta.waits for claim in adapters[-1].claims):
            veneer.calibrate(one, adapters[-1], [text()])
        perturb(adapters[-1], 0.1)
    if kind == "int8":  # on a CPU it rounds activations to 8 bits in evaluation alone
        for module in linears(model).values():
            module.training = True
    if waits:  # the two bases' activations differ in their last bits
        adapters[1].load_state_dict(adapters[0].state_dict())
    same_tensors(adapters[0].state_dict(), adapters[1].state_dict())
    answer = backward(model)
    torch.testing.assert_close(answer, backward(other), **CLOSE)
    assert (answer - base).abs().max() > 1e-3, "the adapter changes nothing"
    largest = max(parameter.grad.abs().max().item() for parameter in adapters[1].parameters())
    close = {"rtol": 1e-4, "atol": 1e-5 * largest}
    for (key, mine), its in zip(adapters[0].named_parameters(), adapters[1].parameters(), strict=True):
        assert mine.grad.abs().max() > 0, key
        torch.testing.assert_close(mine.grad, its.grad, **close, msg=lambda words, key=key: f"{key}: {words}")
    mine = {id(parameter) for parameter in adapters[0].parameters()}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in mine)


def test_a_model_that_transformers_quantized(tmp_path):
    """What `from_pretrained` with a BitsAndBytesConfig gives is what these tests make by hand."""
    dense().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32
    ).eval()
    for module in linears(model).values():
        assert type(module) is bnb.nn.Linear4bit
        module.support_avx512bf16_for_cpu = False
    other = twin(model)
    for one in (model, other):
        torch.manual_seed(1)
        perturb(veneer.attach(one, veneer.LoRA(rank=4)), 0.1)
    assert veneer.count_parameters(model) == veneer.count_parameters(other)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, text()), logits(other, text()), **CLOSE)


def test_a_model_that_transformers_quantized_by_torchao(tmp_path):
    dense().save_pretrained(tmp_path)
    config = TorchAoConfig(TORCHAO["torchao-int8"])
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32).eval()
    assert {type(module.weight).__name__ for module in linears(model).values()} == {"Int8Tensor"}
    adapter = veneer.attach(model, veneer.LoRA(rank=4))
    perturb(adapter, 0.1)
    other = twin(model)
    perturb(veneer.attach(other, veneer.LoRA(rank=4)), 0.1)
    veneer.adapters(other)["default"].load_state_dict(adapter.state_dict())
    torch.testing.assert_close(backward(model), backward(other), **CLOSE)
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())


@eight_bit
def test_int8_in_evaluation_is_near_its_dense_twin():
    """It rounds activations to 8 bits there: within 3% of the largest logit, as measured over all methods."""
    model = quantized("int8")
    other = twin(model)
    answers = []
    for one in (model, other):
        torch.manual_seed(1)
        perturb(veneer.attach(one, veneer.LoRA(rank=4)), 0.1)
        answers.append(backward(one))
    assert 1e-4 < (answers[0] - answers[1]).abs().max() / answers[1].abs().max() < 3e-2


@pytest.mark.parametrize("kind", KINDS)
def test_elements_are_counted_and_not_bytes(kind):
    model = quantized(kind)
    assert veneer.count_parameters(model).total == sum(p.numel() for p in dense().parameters())
    plain, adapter = dense(), veneer.attach(model, veneer.LoRA(rank=4))
    veneer.attach(plain, veneer.LoRA(rank=4))
    assert veneer.count_parameters(model) == veneer.count_parameters(plain)
    assert veneer.count_parameters(model).trainable == sum(p.numel() for p in adapter.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_training_a_quantized_weight_whole_is_refused(kind):
    model = quantized(kind)
    before = stored(model)
    with pytest.raises(MethodError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        veneer.attach(model, veneer.FullFineTuning(), where="layers.1.mlp.up_proj")
    assert not veneer.adapters(model)
    same_tensors(stored(model), before)
    veneer.attach(model, veneer.FullFineTuning(), where="lm_head")  # a dense weight of the same model can be


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["from quantized to dense", "from dense to quantized"])
def test_one_file_serves_both_bases(kind, direction, tmp_path):
    models = [quantized(kind), dense()]
    here, there = models if direction.startswith("from quantized") else models[::-1]
    adapter = veneer.attach(here, veneer.LoRA(rank=4))
    perturb(adapter)
    veneer.save(adapter, tmp_path / "here")
    loaded = veneer.load(there, tmp_path / "here")
    same_tensors(loaded.state_dict(), adapter.state_dict())
    assert all(tensor.dtype == torch.float32 for tensor in loaded.state_dict().values())
    veneer.save(loaded, tmp_path / "there")
    for file in ("adapter_model.safetensors", "adapter_config.json", "veneer.json"):
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file


@eight_bit
@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains(kind):
    model = quantized(kind)
    adapter = veneer.attach(model, veneer.LoRA(rank=4))
    before = stored(model)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**text(), labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2, losses
    after, mine = stored(model), {f".adapters.{adapter.name}."}
    for key, tensor in after.items():
        assert equal(tensor, before[key]) is not any(part in key for part in mine), key
    veneer.detach(model, adapter)
    same_tensors(stored(model), {key: t for key, t in before.items() if ".adapters." not in key})


@eight_bit
@pytest.mark.parametrize("kind", KINDS)
def test_copies_keep_the_adapter(kind):
    model = quantized(kind)
    perturb(veneer.attach(model, veneer.LoRA(rank=4)))
    other = copy.deepcopy(model)
    for module in linears(other).values():
        module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        adapted = logits(model, text())
        assert torch.equal(logits(other, text()), adapted)
        veneer.detach(other, "default")
        assert not torch.equal(logits(other, text()), adapted)
        assert torch.equal(logits(model, text()), adapted)


def test_bitsandbytes_is_kept_from_repacking_for_inference():
    """On some CPUs its first forward in evaluation would stop every gradient below, silently."""
    model = dense()
    for path, module in linears(model).items():
        model.set_submodule(path, quantize(module, "nf4"))
        model.get_submodule(path).support_avx512bf16_for_cpu = True  # as bitsandbytes sets it where the CPU can
    adapter = veneer.attach(model, veneer.LoRA(rank=4), "layers.0.*.q_proj")
    with torch.no_grad():
        logits(model.eval(), text())
    backward(model)
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    veneer.detach(model, adapter)
    state = model.model.layers[1].mlp.up_proj.weight.quant_state
    state.packing_format_for_cpu = True
    with pytest.raises(PlaceError, match="repacked this model for inference"):
        veneer.attach(model, veneer.LoRA(rank=4))
    assert not veneer.adapters(model)
