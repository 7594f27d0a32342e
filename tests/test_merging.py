"""Merging: one rounding, bit-equal ways back, and a model that is whole after every refusal and failure."""

from __future__ import annotations

import contextlib

import pytest
import torch
from ports import KeySlots
from tiny import FAMILIES, logits, perturb
from torch import nn

import veneer
from veneer import errors
from veneer.delta import Place


def attach(model, name="default", method=None, where=None, scale=0.2):
    adapter = veneer.attach(model, method or veneer.LoRA(rank=2), where, name=name)
    perturb(adapter, scale)
    return adapter


def stored(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in before)


def answer(model, family="llama"):
    with torch.no_grad():
        return logits(model, FAMILIES[family].batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merge_and_unmerge_are_bit_equal(family, dtype):
    model = FAMILIES[family].model().to(dtype)
    base = answer(model, family)
    adapter = attach(model)
    before, adapted = stored(model), answer(model, family)
    veneer.merge(model, adapter)
    assert not same(model, before)
    veneer.unmerge(model, adapter)
    assert same(model, before)
    assert torch.equal(answer(model, family), adapted)
    veneer.merge(model, adapter)
    veneer.detach(model, adapter)
    assert torch.equal(answer(model, family), base)


def test_merging_rounds_once():
    """W and s·B·A are added in float32, and only their sum is rounded; this differs from rounding s·B·A first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    adapter = attach(model, method=veneer.LoRA(rank=4, alpha=6.0), where="0")
    pair = adapter.claims[0].delta
    assert pair.A.dtype == torch.float32
    w = model[0].weight.clone()
    change = 1.5 * (pair.B @ pair.A).detach()
    once, twice = (w.float() + change).bfloat16(), w + change.bfloat16()
    assert not torch.equal(once, twice)
    veneer.merge(model, adapter)
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, once)


def test_subtracting_would_not_have_restored():
    """Why merge keeps a copy: in bfloat16 taking the change off again misses most of the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    before = model[0].weight.clone()
    adapter = attach(model, where="0")
    pair = adapter.claims[0].delta
    veneer.merge(model, adapter)
    subtracted = (model[0].weight.float() - pair.scale * pair.B @ pair.A).bfloat16()
    assert not torch.equal(subtracted, before)
    veneer.unmerge(model, adapter)
    assert torch.equal(model[0].weight, before)


def test_parameters_stay_the_same_objects():
    """An optimizer, a tied module or a compiled graph that holds a parameter goes on holding the right one."""
    model = FAMILIES["llama"].model()
    adapter = attach(model)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    veneer.merge(model, adapter)
    veneer.unmerge(model, adapter)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before


def test_the_last_merged_is_unmerged_first():
    model = FAMILIES["llama"].model()
    states = [stored(model)]
    for name in ("one", "two"):
        attach(model, name)
    before = stored(model)
    veneer.merge(model, "two")  # in an order of its own
    veneer.merge(model, "one")
    both = stored(model)
    for call in (veneer.unmerge, veneer.detach):
        with pytest.raises(errors.AdapterError) as caught:
            call(model, "two")
        assert str(caught.value) == "Adapter 'one' was merged after 'two'. Unmerge 'one' first."
        assert same(model, both)
    assert list(veneer.adapters(model)) == ["one", "two"]
    veneer.unmerge(model, "one")
    veneer.unmerge(model, "two")
    assert same(model, before)
    veneer.detach(model, "two")
    veneer.detach(model, "one")
    assert same(model, states[0])


def test_two_merged_are_both_stacked():
    model = FAMILIES["llama"].model()
    for name, scale in (("one", 0.2), ("two", -0.3)):
        attach(model, name, scale=scale)
    veneer.activate(model, "one", "two")
    both = answer(model)
    veneer.merge(model, "one")
    torch.testing.assert_close(answer(model), both, rtol=1e-6, atol=1e-6)
    veneer.merge(model, "two")
    torch.testing.assert_close(answer(model), both, rtol=1e-6, atol=1e-6)
    veneer.unmerge(model, "two")
    veneer.unmerge(model, "one")
    assert torch.equal(answer(model), both)


def test_merging_a_resting_adapter_makes_it_act():
    model = FAMILIES["llama"].model()
    attach(model, "one")
    attach(model, "two", scale=-0.3)
    veneer.merge(model, "one")
    merged = answer(model)
    veneer.unmerge(model, "one")
    veneer.activate(model, "one", "two")
    torch.testing.assert_close(merged, answer(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "route",
    [
        lambda model: veneer.use(model).__enter__(),
        lambda model: veneer.use(model, "two").__enter__(),
        lambda model: veneer.activate(model),
        lambda model: veneer.activate(model, "two"),
        lambda model: veneer.activate(model, rows=["one", None, "one"]),
    ],
    ids=["use base", "use two", "activate base", "activate two", "rows"],
)
def test_nothing_runs_without_the_merged(route):
    model = FAMILIES["llama"].model()
    attach(model, "one")
    attach(model, "two")
    veneer.merge(model, "one")
    before = answer(model)
    with pytest.raises(errors.AdapterError) as caught:
        route(model)
    assert str(caught.value) == (
        "Adapter 'one' is merged into the weights, so nothing can run without it. Call veneer.unmerge first."
    )
    assert torch.equal(answer(model), before)
    with veneer.use(model, "one"):
        only = answer(model)
    veneer.unmerge(model, "one")
    with veneer.use(model, "one"):
        torch.testing.assert_close(answer(model), only, rtol=1e-6, atol=1e-6)


def test_attaching_beside_a_merged_adapter_works_or_changes_nothing():
    model = FAMILIES["llama"].model()
    attach(model, "one")
    veneer.merge(model, "one")
    before, merged = stored(model), answer(model)
    try:
        veneer.attach(model, veneer.LoRA(rank=2), name="two")
    except errors.AdapterError:
        refused = True
    else:
        refused = False
    assert list(veneer.adapters(model)) == (["one"] if refused else ["one", "two"])
    if not refused:
        veneer.detach(model, "two")
    assert same(model, before)
    assert torch.equal(answer(model), merged)


def test_twice_merged_and_never_merged():
    model = FAMILIES["llama"].model()
    attach(model)
    with pytest.raises(errors.AdapterError, match=r"^Adapter 'default' is not merged\.$"):
        veneer.unmerge(model, "default")
    veneer.merge(model, "default")
    before = stored(model)
    with pytest.raises(errors.AdapterError, match=r"^Adapter 'default' is merged already\. Call veneer\.unmerge"):
        veneer.merge(model, "default")
    with pytest.raises(errors.AdapterError, match="merged already"):
        veneer.merge(model, "default", permanent=True)
    assert same(model, before)


@pytest.mark.parametrize(("role", "names"), [("embedding", "lm_head.weight"), ("head", "lm_head.weight")])
def test_a_tied_weight_is_not_merged(role, names):
    model = FAMILIES["gpt2"].model()
    adapter = attach(model, where=f"{role} | attention.o")
    before, adapted = stored(model), answer(model, "gpt2")
    for permanent in (False, True):
        with pytest.raises(errors.NotMergeable) as caught:
            veneer.merge(model, adapter, permanent=permanent)
        assert str(caught.value) == (
            f"transformer.wte.weight is tied to {names}, which merging would change too. Untie them first, or keep "
            "the adapter attached."
        )
        assert same(model, before)
    assert torch.equal(answer(model, "gpt2"), adapted)


def test_a_tied_weight_trained_whole_is_merged_for_all():
    model = FAMILIES["gpt2"].model()
    adapter = attach(model, method=veneer.FullFineTuning(), where="embedding | head")
    adapted = answer(model, "gpt2")
    veneer.merge(model, adapter, permanent=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(answer(model, "gpt2"), adapted, rtol=1e-9, atol=1e-9)


def test_activations_have_no_weight():
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, (veneer.LoRA(rank=2),), name="lora")
    mixed = veneer.attach(model, {"q_proj": veneer.LoRA(rank=2), "attention": KeySlots()}, name="mixed")
    before = stored(model)
    with pytest.raises(errors.NotMergeable, match="KeySlots acts on activations; it has no merged weight"):
        veneer.merge(model, mixed)
    assert same(model, before)
    veneer.activate(model, adapter)
    veneer.merge(model, adapter)
    veneer.unmerge(model, adapter)
    assert same(model, before)


def test_permanent_gives_a_plain_model():
    model = FAMILIES["llama"].model()
    kind, keys = type(model), list(model.state_dict())
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    adapter = attach(model)
    adapted = answer(model)
    veneer.merge(model, adapter, permanent=True)
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert "_veneer" not in vars(model)
    torch.testing.assert_close(answer(model), adapted, rtol=1e-6, atol=1e-6)
    assert not adapter.attached
    assert adapter.originals == []
    for call in (veneer.merge, veneer.unmerge, veneer.detach, veneer.activate):
        with pytest.raises(errors.UnknownAdapter, match=r"has no adapter 'default'\. It has none\."):
            call(model, adapter)


def test_permanent_beside_another():
    model = FAMILIES["llama"].model()
    attach(model, "one")
    attach(model, "two", scale=-0.3)
    veneer.activate(model, "one", "two")
    both = answer(model)
    veneer.merge(model, "one", permanent=True)
    assert list(veneer.adapters(model)) == ["two"]
    torch.testing.assert_close(answer(model), both, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_failure_midway_restores_everything(monkeypatch, family, kind, permanent):
    model = FAMILIES[family].model()
    adapter = attach(model, where="attention.q | attention.v | mlp.down")
    before, adapted = stored(model), answer(model, family)
    write, calls = Place.write, []

    def fails(self, weight):
        calls.append(self.path)
        if len(calls) == 4:
            raise kind("midway")
        write(self, weight)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "write", fails)
        with pytest.raises(kind, match="midway"):
            veneer.merge(model, adapter, permanent=permanent)
    assert same(model, before)
    assert torch.equal(answer(model, family), adapted)
    assert adapter.originals == []
    veneer.merge(model, adapter)
    veneer.unmerge(model, adapter)
    assert same(model, before)


def test_detaching_a_merged_adapter_restores():
    model = FAMILIES["gpt2"].model()
    before, base = stored(model), answer(model, "gpt2")
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    adapter = attach(model, where="attention")
    veneer.merge(model, adapter)
    assert not torch.equal(answer(model, "gpt2"), base)
    veneer.detach(model, adapter)
    assert same(model, before)
    assert torch.equal(answer(model, "gpt2"), base)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted


def test_stacked_methods_of_one_adapter_merge_in_order():
    model = FAMILIES["llama"].model()
    adapter = attach(model, method=(veneer.LoRA(rank=2), veneer.LoRA(rank=3, alpha=5.0)), where="mlp")
    before, adapted = stored(model), answer(model)
    veneer.merge(model, adapter)
    torch.testing.assert_close(answer(model), adapted, rtol=1e-6, atol=1e-6)
    veneer.unmerge(model, adapter)
    assert same(model, before)


@pytest.mark.parametrize("order", [1, -1], ids=["copy then LoRA", "LoRA then copy"])
def test_a_copy_and_a_lora_stacked_merge_to_what_they_computed(order):
    model = FAMILIES["llama"].model()
    attach(model, method=(veneer.FullFineTuning(), veneer.LoRA(rank=2))[::order], where="q_proj")
    adapted = answer(model)
    veneer.merge(model, "default")
    torch.testing.assert_close(answer(model), adapted, rtol=1e-6, atol=1e-6)


def test_merging_one_of_two_at_a_place_changes_no_answer_or_is_refused():
    """A copy attached after a LoRA replaces the weight that the LoRA was merged into."""
    model = FAMILIES["llama"].model()
    attach(model, "lora", where="q_proj")
    attach(model, "copy", veneer.FullFineTuning(), "q_proj")
    veneer.activate(model, "lora", "copy")
    both = answer(model)
    with contextlib.suppress(errors.AdapterError):
        veneer.merge(model, "lora")
    torch.testing.assert_close(answer(model), both, rtol=1e-6, atol=1e-6)


def test_a_merged_adapter_saves_as_itself(tmp_path):
    model = FAMILIES["llama"].model()
    adapter = attach(model)
    apart = veneer.save(adapter, tmp_path / "apart")
    veneer.merge(model, adapter)
    merged = veneer.save(adapter, tmp_path / "merged")
    for file in apart.iterdir():
        assert (merged / file.name).read_bytes() == file.read_bytes()


def test_the_summary_says_so():
    model = FAMILIES["llama"].model()
    adapter = attach(model)
    assert "merged" not in adapter.summary()
    veneer.merge(model, adapter)
    assert "merged into the base's weights" in adapter.summary()
