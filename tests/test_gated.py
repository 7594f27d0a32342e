"""Gates against their formula, port by port."""

from __future__ import annotations

import json

import pytest
import torch
from laws import same
from ports import InputScale, KeySlots
from tiny import FAMILIES, WIDTH, logits, perturb
from torch import nn

import veneer
from veneer.errors import CorruptFile, FileError, MethodError

LORA = veneer.LoRA(rank=3)


def attach(method, where=None, family="llama", **options):
    model = FAMILIES[family].model()
    adapter = veneer.attach(model, method, where, **options)
    perturb(adapter)
    return model, adapter


def test_the_gate_of_a_lora_is_a_sigmoid_of_each_token():
    _, adapter = attach(veneer.Gated(LORA), "attention.q")
    delta = adapter.claims[0].delta
    x, y = torch.randn(2, 5, WIDTH).double(), torch.randn(2, 5, WIDTH).double()
    pair = delta.inner
    change = x @ pair.A.T @ pair.B.T * pair.scale
    gate = torch.sigmoid(x @ delta.weight[0] + delta.bias)
    same(delta(x, y), y + gate.unsqueeze(-1) * change)
    same(delta(x[:, :2], y[:, :2]), delta(x, y)[:, :2])


@pytest.mark.parametrize("placement", ["serial", "parallel", "after_residual"])
def test_the_gate_of_a_bottleneck_reads_what_it_reads(placement):
    _, adapter = attach(veneer.Gated(veneer.BottleneckAdapter(width=4, placement=placement)))
    delta = adapter.claims[0].delta
    x, y = torch.randn(2, 5, WIDTH).double(), torch.randn(2, 5, WIDTH).double()
    gate = torch.sigmoid((y if placement == "serial" else x) @ delta.weight[0] + delta.bias)
    same(delta(x, y), y + gate.unsqueeze(-1) * (delta.inner(x, y) - y))


def test_the_gate_of_a_prefix_scales_its_keys_and_values_and_no_others():
    _, adapter = attach(veneer.Gated(KeySlots(length=3)))
    delta = adapter.claims[0].delta
    heads, *widths = adapter.claims[0].place.shape
    k, v = (torch.randn(2, heads, 4, width).double() for width in widths)
    gate = torch.sigmoid(delta.bias)
    for new, own, slots in zip(delta(k, v), (k, v), (delta.inner.k, delta.inner.v), strict=True):
        assert torch.equal(new[:, :, 3:], own)
        same(new[:, :, :3], gate * slots.expand(2, -1, -1, -1))


class _Louder(veneer.KeyValue):
    def __init__(self, place):
        super().__init__()
        self.factor = nn.Parameter(torch.full((1,), 3.0, dtype=torch.float64))

    def forward(self, k, v):
        return k * self.factor, v


def test_the_gate_of_changed_keys_lies_between_them_and_the_base(monkeypatch):
    monkeypatch.setattr(KeySlots, "build", lambda self, place: _Louder(place))
    _, adapter = attach(veneer.Gated(KeySlots()))
    delta = adapter.claims[0].delta
    k = torch.ones(1, 2, 4, 8).double()
    keys, values = delta(k, k)
    same(keys, k + torch.sigmoid(delta.bias) * (delta.inner.factor - 1))
    assert torch.equal(values, k)


def test_a_gate_starts_half_open():
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, veneer.Gated(LORA), "attention.q")
    perturb(adapter)
    with torch.no_grad():
        for claim in adapter.claims:
            claim.delta.weight.zero_(), claim.delta.bias.zero_()
    gated = logits(model, FAMILIES["llama"].batch())
    with torch.no_grad():
        for claim in adapter.claims:
            claim.delta.inner.scale /= 2
            claim.delta.bias.fill_(1000.0)
    same(logits(model, FAMILIES["llama"].batch()), gated)


def test_a_gate_adds_its_width_and_one():
    plain, gated = (attach(method, "attention.q | attention.v")[1] for method in (LORA, veneer.Gated(LORA)))
    count = [sum(p.numel() for p in adapter.parameters()) for adapter in (plain, gated)]
    assert count[1] - count[0] == len(plain.claims) * (WIDTH + 1)


def test_a_gated_method_stands_where_the_method_stands():
    for method in (LORA, veneer.BottleneckAdapter(), KeySlots()):
        gated = veneer.Gated(method)
        assert (gated.unit, gated.default_where) == (method.unit, method.default_where)


def test_what_the_method_says_of_training_still_holds():
    model, adapter = attach(veneer.Gated(veneer.LoRA(rank=2, bias="lora_only")), "attention.q", family="bert")
    assert [type(claim.method).__name__ for claim in adapter.claims] == ["Gated"] * 2 + ["FullFineTuning"] * 2
    slow, fast = adapter.parameter_groups(lr=1e-3, lora_plus_ratio=16)
    assert [p.shape[1] for p in fast["params"]] == [2, 2]
    assert len(slow["params"]) == 8
    with pytest.raises(MethodError, match="The pattern 'nowhere' matches none of LoRA's 2 places"):
        veneer.attach(model, veneer.Gated(veneer.LoRA(rank_pattern={"nowhere": 3})), "attention.q", name="other")


REFUSED = [
    (InputScale(), "mlp.down", "changes no output here, which a gate could scale"),
    (LORA, "embedding", "a gate reads vectors, and this layer is given none"),
    (veneer.FullFineTuning(), "*", "changes no output here, which a gate could scale"),
]


@pytest.mark.parametrize(("method", "where", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_has_no_gate_is_refused(method, where, words):
    with pytest.raises(MethodError, match=f"Gated at .*{words}"):
        attach(veneer.Gated(method), where)


def test_a_gate_is_put_on_a_method():
    with pytest.raises(MethodError, match=r"Gated\(method='LoRA'\): method should be an instance of Method"):
        veneer.Gated("LoRA")


def test_the_recipe_holds_the_method_inside(tmp_path):
    _, adapter = attach(veneer.Gated(veneer.Gated(veneer.LoRA(rank=2, rank_pattern={"q_proj": 3}))))
    veneer.save(adapter, tmp_path)
    recipe = json.loads((tmp_path / "veneer.json").read_text())
    (claim,) = recipe["claims"]
    assert claim["method"] == "Gated"
    assert claim["options"]["method"]["method"] == "Gated"
    lora = claim["options"]["method"]["options"]["method"]
    assert (lora["method"], lora["options"]["rank_pattern"]) == ("LoRA", {"q_proj": 3})
    assert veneer.load(FAMILIES["llama"].model(), tmp_path).claims[0].method == adapter.claims[0].method


@pytest.mark.parametrize(
    ("inside", "kind", "words"),
    [
        ({"method": "LoRRA", "options": {}}, FileError, r"uses the method 'LoRRA', .* Closest: LoRA"),
        ({"method": "LoRA", "options": {"rank": 0}}, CorruptFile, r"LoRA\(rank=0\)"),
        ({"method": "LoRA", "options": {"ranks": 2}}, CorruptFile, "ranks"),
        ({"method": ["LoRA"], "options": {}}, CorruptFile, "method should be an instance of Method"),
        ({"rank": 2}, CorruptFile, "method should be an instance of Method"),
    ],
)
def test_a_bad_method_inside_a_recipe_is_named(tmp_path, inside, kind, words):
    _, adapter = attach(veneer.Gated(LORA))
    veneer.save(adapter, tmp_path)
    recipe = json.loads((tmp_path / "veneer.json").read_text())
    recipe["claims"][0]["options"]["method"] = inside
    (tmp_path / "veneer.json").write_text(json.dumps(recipe))
    with pytest.raises(kind, match=words):
        veneer.load(FAMILIES["llama"].model(), tmp_path)


def test_what_only_trains_a_prefix_is_folded_inside_its_gate(tmp_path):
    model, adapter = attach(veneer.Gated(veneer.PrefixTuning(length=3, reparameterization=True, hidden=5)))
    answer = logits(model, FAMILIES["llama"].batch())
    veneer.save(adapter, tmp_path)
    other = FAMILIES["llama"].model()
    loaded = veneer.load(other, tmp_path)
    assert {claim.method for claim in loaded.claims} == {veneer.Gated(veneer.PrefixTuning(length=3))}
    assert not loaded.shared
    same(logits(other, FAMILIES["llama"].batch()), answer)
    same(logits(model, FAMILIES["llama"].batch()), answer)
