"""NF4: the bytes of bitsandbytes, every awkward weight, and checkpoints."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, logits, perturb
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, WavLMConfig, WavLMModel

import veneer
from veneer.errors import CorruptFile, NoSuchPlace, PlaceError
from veneer.formats.nf4 import NF4Linear
from veneer.ops import nf4

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # bitsandbytes says at import which kernels it does without on a CPU
    import bitsandbytes as bnb
    from bitsandbytes import functional

SHAPES = [(64, 64), (1024, 512), (37, 129), (3, 5), (1, 1), (2, 65)]


def weight(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_bitsandbytes(shape, dtype, block, double):
    w = weight(shape, dtype)
    theirs, state = functional.quantize_4bit(w, blocksize=block, quant_type="nf4", compress_statistics=double)
    ours = nf4.quantize(w, block, double)
    assert torch.equal(ours.data, theirs)
    assert torch.equal(ours.absmax, state.absmax)
    if double:
        assert torch.equal(ours.outer, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset)
    if shape[1] % block == 0:  # bitsandbytes 0.50.2 reads other rows wrongly on a CPU
        assert torch.equal(nf4.dequantize(ours, dtype), functional.dequantize_4bit(theirs, state))


def test_the_levels_are_those_of_bitsandbytes():
    assert torch.equal(nf4.levels(), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_levels(), functional.create_dynamic_map())


def test_bits_of_the_storage():
    w = weight((1024, 1024))
    assert round(nf4.quantize(w, double_quant=True).bits, 3) == 4.127
    assert nf4.quantize(w, double_quant=False).bits == 4.5


def test_a_block_of_zeros_stays_zero():
    w = weight((4, 64))
    w[1] = 0
    for double in (False, True):
        dense = nf4.dequantize(nf4.quantize(w, double_quant=double), torch.float32)
        assert dense[1].abs().max() == 0
        assert dense.isfinite().all()


def llama(**options):
    return veneer.quantize(FAMILIES["llama"].model().float(), veneer.NF4(**options))


def test_only_linears_in_the_blocks_are_quantized():
    model = FAMILIES["llama"].model().bfloat16()
    before = veneer.count_parameters(model).total
    assert veneer.quantize(model, veneer.NF4()) is model
    kinds = {path: type(module) for path, module in model.named_modules()}
    assert sum(kind is NF4Linear for kind in kinds.values()) == 14
    assert kinds["lm_head"] is nn.Linear
    assert model.model.embed_tokens.weight.dtype == model.model.norm.weight.dtype == torch.bfloat16
    assert veneer.count_parameters(model).total == before


def test_skipped_modules_stay_dense():
    model = veneer.quantize(FAMILIES["llama"].model().float(), veneer.NF4(), skip=["o_proj", "re:.*layers\\.0.*"])
    dense = [path for path, m in model.named_modules() if "layers" in path and type(m) is nn.Linear]
    assert all("o_proj" in path or "layers.0" in path for path in dense)
    assert len(dense) == 8
    with pytest.raises(NoSuchPlace, match="no_such"):
        veneer.quantize(FAMILIES["llama"].model(), veneer.NF4(), skip=["no_such"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    model = FAMILIES["llama"].model().float()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = bad
    with pytest.raises(PlaceError, match=r"layers\.1\.mlp\.up_proj has weights that are not finite"):
        veneer.quantize(model, veneer.NF4())
    assert not any(isinstance(module, NF4Linear) for module in model.modules())


def test_what_cannot_be_quantized_is_refused():
    model = FAMILIES["llama"].model()
    veneer.attach(model, veneer.LoRA(rank=2))
    with pytest.raises(PlaceError, match="Quantize, then attach"):
        veneer.quantize(model, veneer.NF4())
    with pytest.raises(PlaceError, match=r"block_size=48.*choose one of 32, 64"):
        veneer.NF4(block_size=48)


@pytest.mark.parametrize("double", [False, True])
def test_checkpoints_go_both_ways_with_bitsandbytes(double, tmp_path):
    dense = nn.Linear(128, 80)
    ours = NF4Linear(copy.deepcopy(dense), 64, double)
    theirs = bnb.nn.Linear4bit(128, 80, quant_type="nf4", compress_statistics=double, compute_dtype=torch.float32)
    theirs.weight = bnb.nn.Params4bit(
        dense.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double, module=theirs
    )
    theirs.bias = dense.bias
    theirs.to("cpu")
    assert list(ours.state_dict()) == [key for key in ours.state_dict() if key in theirs.state_dict()]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key
    save_file({key: t.contiguous().clone() for key, t in theirs.state_dict().items()}, tmp_path / "theirs.safetensors")
    other = NF4Linear(nn.Linear(128, 80), 64, not double)
    other.load_state_dict(load_file(tmp_path / "theirs.safetensors"))
    x = torch.randn(5, 128, requires_grad=True)
    y = torch.randn(5, 128).copy_(x.detach()).requires_grad_()
    for one, inputs in ((other, x), (theirs, y)):
        one.train()(inputs).pow(2).sum().backward()
    assert torch.equal(other(x), theirs(x))
    torch.testing.assert_close(x.grad, y.grad)


def test_a_dense_checkpoint_is_not_taken_for_nf4():
    layer = NF4Linear(nn.Linear(64, 8), 64, True)
    with pytest.raises(CorruptFile, match="no NF4 statistics beside it"):
        layer.load_state_dict(nn.Linear(64, 8).state_dict())


def test_an_adapter_trains_on_it_and_is_taken_off_again():
    model, batch = llama(), FAMILIES["llama"].batch()
    with torch.no_grad():
        base = logits(model, batch)
    adapter = veneer.attach(model, veneer.LoRA(rank=4))
    perturb(adapter)
    logits(model, batch).pow(2).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    veneer.detach(model, adapter)
    with torch.no_grad():
        assert torch.equal(logits(model, batch), base)


def test_copies_keep_their_weights():
    model, batch = llama(), FAMILIES["llama"].batch()
    with torch.no_grad():
        assert torch.equal(logits(copy.deepcopy(model), batch), logits(model, batch))


def test_a_shared_weight_is_refused_before_anything_is_quantized():
    model = FAMILIES["llama"].model().float()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(PlaceError, match=r"mlp\.up_proj shares its weight with another module"):
        veneer.quantize(model, veneer.NF4())
    assert not any(isinstance(module, NF4Linear) for module in model.modules())


def test_linears_whose_weight_other_code_reads_stay_dense():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, state_size=8))
    veneer.quantize(mamba, veneer.NF4())
    mixer = mamba.backbone.layers[0].mixer
    assert isinstance(mixer.in_proj, NF4Linear)
    assert type(mixer.dt_proj) is nn.Linear
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    wavlm = WavLMModel(WavLMConfig(**sizes)).eval()
    veneer.quantize(wavlm, veneer.NF4())
    layer = wavlm.encoder.layers[0]
    assert isinstance(layer.feed_forward.output_dense, NF4Linear)
    assert type(layer.attention.q_proj) is nn.Linear
    assert torch.isfinite(mamba(torch.arange(5)[None]).logits).all()
    assert torch.isfinite(wavlm(torch.randn(1, 2000)).last_hidden_state).all()
