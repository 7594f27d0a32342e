"""Sums, trims and low ranks of trained adapters, against the merged weights that define them."""

from __future__ import annotations

import copy

import pytest
import torch
from laws import same
from tiny import FAMILIES, logits, perturb
from torch import nn

import veneer
from veneer import changes
from veneer.errors import AdapterError, MethodError, NotMergeable, UnknownAdapter

WHERE = "attention.q | attention.v"


def with_two(family="llama", one=None, two=None, where=(WHERE, WHERE)):
    """A model with trained adapters 'a' and 'b'."""
    model = FAMILIES[family].model()
    for name, method, place, scale in zip(
        "ab", (one or veneer.LoRA(rank=3), two or veneer.LoRA(rank=2, alpha=5.0)), where, (0.2, 0.3), strict=True
    ):
        perturb(veneer.attach(model, method, place, name=name), scale)
    return model


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".adapters." not in name}


def change(model, name):
    """What merging this adapter alone changes, by the definition of merging."""
    model = copy.deepcopy(model)
    for other in set(veneer.adapters(model)) - {name}:
        veneer.detach(model, other)
    before = weights(model)
    veneer.merge(model, name)
    after = weights(model)
    return {key: after[key] - before[key] for key in before}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("how", ["sum", "concatenate"])
def test_a_sum_of_loras_is_the_sum_of_their_changes(family, how):
    model = with_two(family)
    done = veneer.combine(model, {"a": 0.7, "b": -0.4}, how=how, name="c")
    a, b, c = (change(model, name) for name in "abc")
    for key in c:
        same(c[key], 0.7 * a[key] - 0.4 * b[key])
    assert {claim.method.rank for claim in done.adapter.claims} == {5}
    assert not done.errors
    assert done.summary() == "Adapter 'c' is exact."


def test_a_sum_acts_as_its_parts_together_and_is_the_active_one():
    model = with_two()
    batch = FAMILIES["llama"].batch()
    done = veneer.combine(model, ["a", "b"], [1.0, 1.0], name="c")
    assert list(veneer.adapters(model)) == ["a", "b", "c"]
    assert all(p.requires_grad for p in done.adapter.parameters())
    with torch.no_grad():
        acting = logits(model, batch)
    with veneer.use(model, "a"):
        one = logits(model, batch)
    with veneer.use(model, "c"):
        same(logits(model, batch), acting)
    merged = change(model, "c")
    parts = [change(model, name) for name in "ab"]
    for key, tensor in merged.items():
        same(tensor, parts[0][key] + parts[1][key])
    assert (one - acting).abs().max() > 1e-3


def test_peft_linear_is_not_a_sum():
    """Adding A and B by themselves gives cross terms; that is why "sum" puts them side by side."""
    model = with_two(two=veneer.LoRA(rank=3))
    a, b = (veneer.adapters(model)[name].claims[0].delta for name in "ab")
    linear = (a.B + b.B) @ (a.A + b.A) * a.scale
    exact = (a.B @ a.A + b.B @ b.A) * a.scale
    assert (linear - exact).norm() > 0.5 * exact.norm()


def test_different_places_are_united():
    model = with_two(where=("attention.q", "attention.q | mlp.down"))
    done = veneer.combine(model, {"a": 2.0, "b": 0.5}, name="c")
    a, b, c = (change(model, name) for name in "abc")
    for key in c:
        same(c[key], 2 * a[key] + 0.5 * b[key])
    assert sorted({claim.method.rank for claim in done.adapter.claims}) == [2, 5]


def test_stacked_loras_and_modules_trained_whole_add_up():
    model = FAMILIES["vit"].model()
    stacked = (veneer.LoRA(rank=2), veneer.LoRA(rank=1, use_rslora=True))
    perturb(veneer.attach(model, stacked, "attention.q", name="a", also_train=["classifier"]))
    perturb(
        veneer.attach(model, veneer.LoRA(bias="lora_only"), "attention.q", name="b", also_train=["classifier"]), 0.1
    )
    done = veneer.combine(model, {"a": 0.6, "b": 0.4}, name="c")
    a, b, c = (change(model, name) for name in "abc")
    assert c["classifier.weight"].abs().max() > 0
    for key in c:
        same(c[key], 0.6 * a[key] + 0.4 * b[key])
    assert done.adapter.also_train == ("classifier",)
    assert done.adapter.claims[0].method == veneer.LoRA(rank=11, alpha=11.0, bias="lora_only")


def test_full_fine_tuning_adds_up_as_task_vectors():
    model = with_two(one=veneer.FullFineTuning(), two=veneer.FullFineTuning(), where=("mlp.up", "mlp.up | norm"))
    veneer.combine(model, {"a": 0.6, "b": 1.5}, name="c")
    a, b, c = (change(model, name) for name in "abc")
    for key in c:
        same(c[key], 0.6 * a[key] + 1.5 * b[key])
    with pytest.raises(MethodError, match="There are no LoRAs to concatenate"):
        veneer.combine(model, {"a": 1.0, "b": 1.0}, how="concatenate", name="d")


@pytest.mark.parametrize("rank", [1, 4, 5])
def test_svd_is_the_best_of_its_rank_and_says_its_error(rank):
    model = with_two()
    done = veneer.combine(model, {"a": 0.7, "b": 0.3}, how="svd", rank=rank, name="c")
    a, b, c = (change(model, name) for name in "abc")
    for claim in done.adapter.claims:
        path = claim.place.path
        exact = 0.7 * a[f"{path}.weight"] + 0.3 * b[f"{path}.weight"]
        s = torch.linalg.svdvals(exact)
        missed = (exact - c[f"{path}.weight"]).norm()
        same(missed, s[rank:].norm(), rtol=1e-7, atol=1e-7)
        assert done.errors[path] == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-7)
    assert (max(done.errors.values()) < 1e-9) == (rank == 5)
    assert ("is exact" in done.summary()) == (rank == 5)


def ties_by_loops(tensors, factors, density):
    """The paper's three steps, an entry at a time, with weights as PEFT has them."""
    kept = []
    for tensor, factor in zip(tensors, factors, strict=True):
        order = sorted(range(tensor.numel()), key=lambda i, t=tensor: -abs(t.flatten()[i].item()))
        chosen = set(order[: round(density * tensor.numel())])
        kept.append([tensor.flatten()[i].item() * factor if i in chosen else 0.0 for i in range(tensor.numel())])
    out = []
    for entries in zip(*kept, strict=True):
        sign = 1 if sum(entries) > 0 else -1
        agreeing = [entry for entry in entries if entry * sign > 0]
        out.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(out, dtype=torch.float64).view(tensors[0].shape)


def test_ties_trims_elects_and_averages():
    torch.manual_seed(0)
    tensors = [torch.randn(6, 5).double() for _ in range(3)]
    factors = [1.0, 0.5, 2.0]
    found = changes.ties(list(zip(factors, tensors, strict=True)), 0.4)
    same(found, ties_by_loops(tensors, factors, 0.4))


def test_ties_of_one_adapter_with_all_entries_is_the_adapter():
    model = with_two()
    veneer.combine(model, {"a": 1.0}, how="ties", rank=3, density=1.0, name="c")
    a, c = change(model, "a"), change(model, "c")
    for key in c:
        same(c[key], a[key])


def test_ties_and_dare_of_whole_weights_need_no_rank():
    model = with_two(one=veneer.FullFineTuning(), two=veneer.FullFineTuning(), where=("mlp.up", "mlp.up"))
    veneer.combine(model, {"a": 1.0, "b": 1.0}, how="ties", density=0.2, name="c")
    veneer.combine(model, {"a": 1.0, "b": 1.0}, how="dare", density=0.5, name="d")
    a, b, c, d = (change(model, name) for name in "abcd")
    key = "model.layers.0.mlp.up_proj.weight"
    same(c[key], ties_by_loops([a[key], b[key]], [1.0, 1.0], 0.2))
    entries = torch.stack([torch.zeros_like(a[key]), 2 * a[key], 2 * b[key], 2 * a[key] + 2 * b[key]])
    assert ((entries - d[key]).abs().min(0).values < 1e-9).all()
    assert [((entries[i] - d[key]).abs() < 1e-9).double().mean().item() for i in range(4)] == pytest.approx(
        [0.25] * 4, abs=0.05
    )


def test_dare_keeps_a_random_share_whose_expectation_is_the_whole():
    tensor = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)).double()
    generator = torch.Generator().manual_seed(0)
    draws = [changes.dare([(1.0, tensor)], 0.25, generator) for _ in range(400)]
    kept = torch.stack([draw != 0 for draw in draws]).double().mean()
    assert kept == pytest.approx(0.25, abs=0.005)
    assert all(torch.equal(draw[draw != 0], (4 * tensor)[draw != 0]) for draw in draws)
    assert (torch.stack(draws).mean(0) - tensor).abs().mean() < 0.1 * tensor.abs().mean()


def test_dare_is_the_same_for_the_same_seed():
    model = with_two()
    parts = {"a": 0.7, "b": 0.3}
    for name, seed in {"c": 4, "d": 4, "e": 5}.items():
        veneer.combine(model, parts, how="dare", rank=8, density=0.5, seed=seed, name=name)
    c, d, e = (veneer.adapters(model)[name].state_dict() for name in "cde")
    assert all(torch.equal(c[key], d[key]) for key in c)
    assert not all(torch.equal(c[key], e[key]) for key in c)


def test_the_mean_of_what_acts_on_activations():
    bottleneck = veneer.BottleneckAdapter(width=4)
    model = with_two(one=bottleneck, two=bottleneck, where=("mlp", "mlp"))
    done = veneer.combine(model, {"a": 3.0, "b": 1.0}, how="average", name="c")
    a, b, c = (veneer.adapters(model)[name].state_dict() for name in "abc")
    for key in c:
        same(c[key], 0.75 * a[key] + 0.25 * b[key])
    assert not done.errors


def test_a_combined_adapter_is_saved_and_loaded(tmp_path):
    model = with_two(where=("attention.q", "attention.q | mlp.down"))
    done = veneer.combine(model, {"a": 0.7, "b": 0.3}, name="c")
    veneer.save(done.adapter, tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    other = FAMILIES["llama"].model()
    veneer.load(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(logits(other, FAMILIES["llama"].batch()), logits(model, FAMILIES["llama"].batch()))


REFUSED = [
    ({"parts": {"a": 1.0, "x": 1.0}}, UnknownAdapter, "no adapter 'x'"),
    ({"parts": ["a", "b"]}, AdapterError, "Give each part its weight: a mapping such as"),
    ({"parts": ["a", "b"], "weights": [1.0]}, AdapterError, "2 adapters and 1 weights"),
    ({"parts": ["a", "a"], "weights": [1.0, 1.0]}, AdapterError, "an adapter twice: a, a"),
    ({"parts": {"a": 0.0}}, AdapterError, "The weight of 'a' is 0.0"),
    ({"parts": {"a": float("nan")}}, AdapterError, "The weight of 'a' is nan"),
    ({"how": "linear"}, MethodError, "how='linear' is none of sum, concatenate, svd, ties, dare, average"),
    ({"rank": 3}, MethodError, "how='sum' has no use for rank=3"),
    ({"how": "svd"}, MethodError, r"a dense change at \S+q_proj. Give the rank"),
    ({"how": "svd", "rank": 0}, MethodError, "rank=0 is less than 1"),
    ({"how": "svd", "rank": 2, "density": 0.5}, MethodError, "how='svd' has no use for density=0.5"),
    ({"how": "ties", "rank": 2, "density": 0.5, "seed": 1}, MethodError, "how='ties' has no use for seed=1"),
    ({"how": "ties", "rank": 2}, MethodError, "density=None must be over 0 and at most 1"),
    ({"how": "dare", "rank": 2, "density": 1.5}, MethodError, "density=1.5 must be over 0 and at most 1"),
    ({"how": "average"}, AdapterError, "LoRA multiplies what it trains, and the mean of factors is not the mean"),
    ({"name": "b"}, veneer.errors.PlaceError, "already has an adapter 'b'"),
]


@pytest.mark.parametrize(("options", "kind", "words"), REFUSED, ids=range(len(REFUSED)))
def test_a_refusal_names_what_is_wrong_and_leaves_the_model(options, kind, words):
    model = with_two()
    keys = list(model.state_dict())
    with pytest.raises(kind, match=words):
        veneer.combine(model, **{"parts": {"a": 1.0, "b": 1.0}, "name": "c", **options})
    assert list(model.state_dict()) == keys


def test_mixtures_of_kinds_are_refused():
    model = with_two(two=veneer.FullFineTuning(), where=("attention.q", "q_proj"))
    with pytest.raises(AdapterError, match=r"'a' and 'b' change .*q_proj.weight by methods of different kinds"):
        veneer.combine(model, {"a": 1.0, "b": 1.0}, name="c")
    with pytest.raises(AdapterError, match="LoRA multiplies what it trains"):
        veneer.combine(model, {"a": 1.0, "b": 1.0}, how="average", name="c")
    model = with_two(two=veneer.BottleneckAdapter(), where=("attention.q", "mlp"))
    with pytest.raises(AdapterError, match=r"BottleneckAdapter at model.layers.0.mlp\S* of 'b' changes no weight"):
        veneer.combine(model, {"a": 1.0, "b": 1.0}, name="c")


def test_merged_adapters_are_refused():
    model = with_two()
    veneer.merge(model, "b")
    for call in (
        lambda: veneer.combine(model, {"a": 1.0, "b": 1.0}, name="c"),
        lambda: veneer.to_lora(model, "a", 2, name="c"),
    ):
        with pytest.raises(AdapterError, match=r"Adapter 'b' is merged, .* Call veneer.unmerge first"):
            call()


def test_means_need_the_same_methods_and_a_weight():
    model = with_two(one=veneer.BottleneckAdapter(width=3), two=veneer.BottleneckAdapter(width=4), where=("mlp", "mlp"))
    with pytest.raises(AdapterError, match="'a' and 'b' have different methods or places"):
        veneer.combine(model, {"a": 1.0, "b": 1.0}, how="average", name="c")
    model = with_two(one=veneer.BottleneckAdapter(), two=veneer.BottleneckAdapter(), where=("mlp", "mlp"))
    with pytest.raises(AdapterError, match="The weights sum to zero"):
        veneer.combine(model, {"a": 1.0, "b": -1.0}, how="average", name="c")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_to_lora_of_lora_is_exact(family):
    model = with_two(family)
    done = veneer.to_lora(model, "a", 3, name="c")
    a, c = change(model, "a"), change(model, "c")
    for key in c:
        same(c[key], a[key])
    assert set(done.errors.values()) == {0.0}
    assert "is exact" in done.summary()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5"])
def test_to_lora_of_whole_weights_is_their_best_approximation(family):
    model = FAMILIES[family].model()
    adapter = veneer.attach(model, veneer.FullFineTuning(), "*", name="a")
    perturb(adapter, 0.05)
    done = veneer.to_lora(model, "a", 4, name="c")
    veneer.activate(model)
    owners = dict(model.named_modules())
    lost = {path: error for path, error in done.errors.items() if error}
    assert lost
    values = {claim.place.path: claim for claim in adapter.claims}
    for claim in done.adapter.claims:
        place, delta = claim.place, claim.delta
        if isinstance(claim.method, veneer.FullFineTuning):
            assert torch.equal(delta.value, values[place.path].delta.value)
            continue
        before = place.read()
        whole = next(c for c in adapter.claims if c.place.weight is place.weight)
        after = whole.delta.value if isinstance(owners[place.owner_path], nn.Linear) else None
        if after is not None:
            exact = (after - before).flatten(1)
            s = torch.linalg.svdvals(exact)
            got = (delta.merge(before) - before).flatten(1)
            same((got - exact).norm(), s[4:].norm(), rtol=1e-8, atol=1e-8)
            assert done.errors[place.path] == pytest.approx(float(s[4:].norm() / s.norm()), abs=1e-9)
    assert "leaves out" in done.summary()


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit"])
def test_to_lora_of_full_rank_acts_as_the_adapter(family):
    """At the rank of the matrices nothing is lost, whatever the storage: the model answers the same."""
    model = FAMILIES[family].model()
    batch = FAMILIES[family].batch()
    perturb(veneer.attach(model, veneer.FullFineTuning(), "block", name="a"), 0.05)
    with torch.no_grad():
        adapted = logits(model, batch)
    done = veneer.to_lora(model, "a", 64, name="c")
    with veneer.use(model, "c"):
        same(logits(model, batch), adapted, rtol=1e-6, atol=1e-6)
    assert max(done.errors.values()) < 1e-9


def test_to_lora_refuses_what_cannot_be_merged():
    model = with_two(two=veneer.BottleneckAdapter(), where=("attention.q", "mlp"))
    with pytest.raises(NotMergeable, match=r"BottleneckAdapter at .* acts on activations; no LoRA comes near it"):
        veneer.to_lora(model, "b", 4, name="c")
    with pytest.raises(MethodError, match="rank=0 is less than 1"):
        veneer.to_lora(model, "a", 0, name="c")


METHODS = {
    "DoRA": veneer.DoRA(rank=2),
    "VeRA": veneer.VeRA(rank=8),
    "OFT": veneer.OFT(block_size=8),
    "IA3": veneer.IA3(),
    "LoRA-FA": veneer.LoRAFA(rank=3),
    "PiSSA": veneer.LoRA(rank=3, init="pissa"),
    "AdaLoRA": veneer.AdaLoRA(total_steps=9, initial_rank=4, target_rank=2),
    "HiRA": veneer.HiRA(rank=2),
    "LoHa": veneer.LoHa(rank=2),
    "MiSS": veneer.MiSS(rank=4),
    "SHiRA": veneer.SHiRA(rank=2),
    "BitFit": veneer.BitFit(),
    "LayerNorm": veneer.LayerNormTuning(),
    "tokens": veneer.TrainableTokens(tokens=[5, 9, 40]),
    "stacked": (veneer.DoRA(rank=2), veneer.LoRA(rank=2)),
    "LoRA and whole": {"attention": veneer.LoRA(rank=2, bias="lora_only"), "mlp": veneer.FullFineTuning()},
}


NOWHERE = {
    *(("tokens", base) for base in ("gpt2", "bert")),
    ("IA3", "mixtral"),
    *((kind, base) for kind in ("BitFit", "LoRA and whole") for base in ("llama", "mixtral")),
}
PAIRS = [
    (kind, base) for kind in METHODS for base in ("llama", "gpt2", "bert", "mixtral") if (kind, base) not in NOWHERE
]


@pytest.mark.parametrize(("kind", "family"), PAIRS)
def test_to_lora_of_any_mergeable_adapter(kind, family):
    """At full rank it changes what merging changes, biases too; at a lower one as little is lost as it says."""
    model = FAMILIES[family].model()
    perturb(veneer.attach(model, METHODS[kind], name="a"), 0.1)
    full = veneer.to_lora(model, "a", 64, name="full")
    low = veneer.to_lora(model, "a", 2, name="low")
    assert {type(claim.method) for claim in full.adapter.claims} <= {veneer.LoRA, veneer.FullFineTuning}
    exact, same_as, near = (change(model, name) for name in ("a", "full", "low"))
    assert max(full.errors.values(), default=0.0) < 1e-9
    for key in exact:
        same(same_as[key], exact[key], rtol=1e-7, atol=1e-7)
    for claim in low.adapter.claims:
        if isinstance(claim.method, veneer.LoRA) and not claim.place.spans:
            key = f"{claim.place.owner_path}.{claim.place.parameter}"
            lost = (near[key] - exact[key]).norm() / exact[key].norm()
            assert low.errors[claim.place.path] == pytest.approx(lost.item(), abs=1e-6)


def test_ia3_adds_up_by_its_distance_from_one():
    model = with_two(one=veneer.IA3(), two=veneer.IA3(), where=(None, None))
    veneer.combine(model, {"a": 0.5, "b": 2.0}, name="c")
    a, b, c = (veneer.adapters(model)[name].state_dict() for name in "abc")
    for key in c:
        same(c[key], 1 + 0.5 * (a[key] - 1) + 2 * (b[key] - 1))


def test_other_methods_add_up_through_a_rank():
    model = with_two(one=veneer.VeRA(rank=4), two=veneer.DoRA(rank=2))
    with pytest.raises(AdapterError, match=r"exact only for LoRA, and there is DoRA, VeRA. Use how='svd' with a rank"):
        veneer.combine(model, {"a": 1.0, "b": -2.0}, name="c")
    veneer.combine(model, {"a": 1.0, "b": -2.0}, how="svd", rank=64, name="c")
    a, b, c = (change(model, name) for name in "abc")
    for key in c:
        same(c[key], a[key] - 2 * b[key], rtol=1e-7, atol=1e-7)


def test_experts_add_up_one_by_one():
    model = with_two("mixtral", where=("*.experts", "*.experts"))
    veneer.combine(model, {"a": 0.7, "b": 0.3}, name="c")
    svd = veneer.combine(model, {"a": 0.7, "b": 0.3}, how="svd", rank=4, name="d")
    a, b, c, d = (change(model, name) for name in "abcd")
    for claim in svd.adapter.claims:
        key = f"{claim.place.owner_path}.{claim.place.parameter}"
        exact = 0.7 * a[key] + 0.3 * b[key]
        same(c[key], exact)
        s = torch.linalg.svdvals(exact)
        same((d[key] - exact).norm(), s[..., 4:].norm(), rtol=1e-6, atol=1e-7)
        assert svd.errors[claim.place.path] == pytest.approx(float(s[..., 4:].norm() / s.norm()), abs=1e-7)


def test_a_norm_of_the_base_has_no_change_behind_another():
    model = FAMILIES["llama"].model()
    perturb(veneer.attach(model, (veneer.LoRA(rank=2), veneer.DoRA(rank=2)), name="a"))
    with pytest.raises(NotMergeable, match=r"model.layers.0.self_attn.q_proj: DoRA measures the base's weight"):
        veneer.to_lora(model, "a", 4)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
@pytest.mark.parametrize(
    ("method", "where"),
    [(veneer.TrainableTokens(tokens=[5, 9, 40]), "embedding"), (veneer.FullFineTuning(), "embedding | head")],
)
def test_a_table_that_is_tied_to_a_head_becomes_a_lora_at_each(family, method, where):
    model, batch = FAMILIES[family].model(), FAMILIES[family].batch()
    adapter = veneer.attach(model, method, where, name="a")
    perturb(adapter)
    assert any(claim.place.tied for claim in adapter.claims)
    adapted = logits(model, batch)
    done = veneer.to_lora(model, "a", 64, name="c")
    assert len(done.errors) > 1
    with veneer.use(model, "c"):
        same(logits(model, batch), adapted, rtol=1e-6, atol=1e-6)


def test_trained_tokens_add_up():
    tokens = veneer.TrainableTokens(tokens=[5, 9])
    model = with_two(one=tokens, two=tokens, where=(None, None))
    veneer.combine(model, {"a": 0.5, "b": 2.0}, name="c")
    a, b, c = (change(model, name) for name in "abc")
    for key in c:
        same(c[key], 0.5 * a[key] + 2 * b[key])
