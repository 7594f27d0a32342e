"""Quantizing around an adapter: the pair takes the error, and each variant is better than rounding alone."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, logits
from torch import nn

import veneer
from veneer import errors
from veneer.formats.nf4 import NF4Linear
from veneer.ops import nf4

WHERE = "attention.q | mlp"


def llama() -> nn.Module:
    return FAMILIES["llama"].model().float()


@pytest.mark.parametrize("init", ["loftq", "pissa", "pissa_niter_16"])
def test_the_pair_takes_the_error(init):
    dense, model = llama(), llama()
    weights = {path: module.weight.detach().clone() for path, module in dense.named_modules() if "proj" in path}
    lora = veneer.LoRA(rank=4, alpha=6.0, init=init)
    adapter, repair = veneer.quantize_around(model, veneer.NF4(double_quant=False), lora, WHERE)
    assert repair.before.keys() == repair.after.keys() == {claim.place.path for claim in adapter.claims}
    for claim in adapter.claims:
        W, Q, pair = weights[claim.place.path], claim.place.read(), claim.delta
        alone = nf4.dequantize(nf4.quantize(W, 64, False), torch.float32)
        assert repair.before[claim.place.path] == pytest.approx(((W - alone).norm() / W.norm()).item(), rel=1e-4)
        left = (W - Q - pair.scale * pair.B @ pair.A).detach().norm() / W.norm()
        assert repair.after[claim.place.path] == pytest.approx(left.item(), rel=1e-4)
        assert repair.after[claim.place.path] < 0.95 * repair.before[claim.place.path]
    assert f"mean error of {len(adapter.claims)} weights" in str(repair)
    others = [path for path, module in model.named_modules() if isinstance(module, NF4Linear)]
    assert set(repair.before) < set(others) == set(weights), "linears without an adapter are stored too"


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_alternating_goes_on_lowering_the_error(init):
    errors_of = []
    for alternations in (1, 5):
        model = llama()
        module = model.model.layers[0].mlp.up_proj
        module.weight.data *= torch.logspace(0, -1.5, module.in_features)  # some directions are larger than others
        lora = veneer.LoRA(rank=8, init=init)
        _, repair = veneer.quantize_around(model, veneer.NF4(), lora, "layers.0.mlp.up_proj", alternations=alternations)
        errors_of.append(next(iter(repair.after.values())))
    assert errors_of[1] < errors_of[0]


def test_it_saves_as_a_plain_lora_and_trains(tmp_path):
    model = llama()
    adapter, _ = veneer.quantize_around(model, veneer.NF4(), veneer.LoRA(rank=4, init="pissa"), name="fitted")
    batch = FAMILIES["llama"].batch()
    logits(model, batch).pow(2).mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    before = logits(model, batch)
    veneer.save(adapter, tmp_path)
    veneer.detach(model, adapter)
    again = veneer.load(model, tmp_path)
    assert again.claims[0].method.init == "kaiming"
    assert torch.equal(logits(model, batch), before)


def test_refusals_leave_the_model_dense():
    model = llama()
    cases = [
        (veneer.LoRA(init="olora"), {}, errors.MethodError, "init='olora' repairs nothing. Use one of loftq, pissa"),
        (veneer.LoRA(init="loftq"), {"alternations": 0}, errors.MethodError, "alternations=0"),
        (veneer.LoRA(rank=500, init="loftq"), {}, errors.MethodError, r"proj has \d+ directions, not rank=500"),
        (veneer.LoRA(init="loftq"), {"where": "nowhere"}, errors.NoSuchPlace, "nowhere"),
        (veneer.LoRA(init="loftq"), {"name": "a.b"}, errors.PlaceError, "a.b"),
    ]
    for method, options, kind, words in cases:
        with pytest.raises(kind, match=words):
            veneer.quantize_around(model, veneer.NF4(), method, **options)
        assert not veneer.adapters(model)
        assert not any(isinstance(module, NF4Linear) for module in model.modules())
