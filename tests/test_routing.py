"""Who acts: use and activate, stacked names, rows of a batch, gradients, and what stays as it was."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, logits, perturb
from torch import nn

import veneer
from veneer import errors

GENERATES = [name for name, family in FAMILIES.items() if family.generates]
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def two(family="llama", where="linear"):
    """A model with the adapters `one` and `two`, both different from the base and from each other."""
    model = FAMILIES[family].model()
    for scale, name in ((0.2, "one"), (-0.3, "two")):
        perturb(veneer.attach(model, veneer.LoRA(rank=2), where, name=name), scale)
    return model


def answer(model, family="llama"):
    with torch.no_grad():
        return logits(model, FAMILIES[family].batch())


def acting(model, *names, **rows):
    with veneer.use(model, *names, **rows):
        return answer(model)


def test_names_choose_who_acts():
    model = two()
    base = FAMILIES["llama"].model()
    results = [acting(model), acting(model, "one"), acting(model, "two"), acting(model, "one", "two")]
    assert torch.equal(results[0], answer(base))
    for i, result in enumerate(results):
        for other in results[:i]:
            assert (result - other).abs().max() > 1e-3


def test_a_handle_is_as_good_as_a_name():
    model = two()
    one = veneer.adapters(model)["one"]
    assert torch.equal(acting(model, one), acting(model, "one"))
    veneer.activate(model, one, "two")
    assert torch.equal(answer(model), acting(model, "one", "two"))
    with pytest.raises(errors.UnknownAdapter, match="LlamaForCausalLM has no adapter 'one'"):
        veneer.activate(two(), one)  # of the same name, on another model


def test_stacking_follows_attaching_not_the_arguments():
    """Two whole copies of one weight do not commute: the one attached later is read."""
    model = FAMILIES["llama"].model()
    for name, scale in (("one", 0.2), ("two", -0.5)):
        perturb(veneer.attach(model, veneer.FullFineTuning(), "norm", name=name), scale)
    later = acting(model, "two")
    assert torch.equal(acting(model, "one", "two"), later)
    assert torch.equal(acting(model, "two", "one"), later)
    assert not torch.equal(acting(model, "one"), later)
    veneer.activate(model, "two", "one")
    assert torch.equal(answer(model), later)


def test_the_same_name_twice_acts_once():
    model = two()
    assert torch.equal(acting(model, "one", "one"), acting(model, "one"))


def test_use_restores_what_acted_before():
    model = two()
    veneer.activate(model, "one")
    before = answer(model)
    with veneer.use(model, "two") as same:
        assert same is model
        assert not torch.equal(answer(model), before)
        with veneer.use(model):
            assert torch.equal(answer(model), answer(FAMILIES["llama"].model()))
        assert torch.equal(answer(model), acting(model, "two"))
    assert torch.equal(answer(model), before)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_use_restores_after_an_exception(kind):
    model = two()
    veneer.activate(model, rows=["one", None, "two"])
    before = answer(model)
    with pytest.raises(kind), veneer.use(model, "two"):
        raise kind
    assert torch.equal(answer(model), before)
    assert torch.is_grad_enabled()


def test_an_error_in_a_forward_leaves_no_shadow():
    model = nn.Sequential(nn.Linear(4, 4))
    perturb(veneer.attach(model, veneer.FullFineTuning(), "0"))
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 3))
    assert "weight" not in vars(model[0])
    with veneer.use(model):
        plain = nn.functional.linear(torch.ones(2, 4), model[0].weight, model[0].bias)
        assert torch.equal(model(torch.ones(2, 4)), plain)


def test_names_that_are_not_there():
    model = two()
    before = answer(model)
    for call in (
        lambda: veneer.activate(model, "oen"),
        lambda: veneer.activate(model, rows=["one", "oen", None]),
        lambda: veneer.use(model, "oen").__enter__(),
        lambda: veneer.detach(model, "oen"),
        lambda: veneer.merge(model, "oen"),
    ):
        with pytest.raises(errors.UnknownAdapter) as caught:
            call()
        assert str(caught.value) == ("LlamaForCausalLM has no adapter 'oen'. Closest: one. It has: one, two.")
    assert torch.equal(answer(model), before)
    with pytest.raises(errors.UnknownAdapter, match=r"^Linear has no adapter 'one'\. It has none\.$"):
        veneer.activate(nn.Linear(2, 2), "one")


def test_names_and_rows_at_once():
    with pytest.raises(errors.AdapterError, match="Name adapters for the whole batch or give `rows`, not both"):
        veneer.activate(two(), "one", rows=["one", "two", None])


def test_use_computes_no_gradients_but_activate_does():
    model = two()
    with veneer.use(model, "one"):
        assert not logits(model, FAMILIES["llama"].batch()).requires_grad
    veneer.activate(model, "one")
    assert logits(model, FAMILIES["llama"].batch()).requires_grad
    veneer.activate(model)
    assert not logits(model, FAMILIES["llama"].batch()).requires_grad


def trains(model):
    return {name: {p.requires_grad for p in adapter.parameters()} for name, adapter in veneer.adapters(model).items()}


def test_activate_freezes_the_others():
    model = two()
    assert trains(model) == {"one": {False}, "two": {True}}  # attaching makes the new one act
    veneer.activate(model, "one")
    assert trains(model) == {"one": {True}, "two": {False}}
    veneer.activate(model, "two", "one")
    assert trains(model) == {"one": {True}, "two": {True}}
    veneer.activate(model)
    assert trains(model) == {"one": {False}, "two": {False}}
    veneer.activate(model, rows=["one", None, ("one",)])
    assert trains(model) == {"one": {True}, "two": {False}}
    veneer.activate(model, rows=["one", None, ("one", "two")])
    assert trains(model) == {"one": {True}, "two": {True}}
    with veneer.use(model, "one"):
        assert trains(model) == {"one": {True}, "two": {True}}
    mine = {id(p) for adapter in veneer.adapters(model).values() for p in adapter.parameters()}
    assert not any(p.requires_grad for p in model.parameters() if id(p) not in mine)


# Rows


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_rows_alone(family):
    model = two(family)
    rows = ["one", ("two", "one"), None]
    with veneer.use(model, rows=rows):
        mixed = answer(model, family)
    for i, row in enumerate([("one",), ("one", "two"), ()]):
        with veneer.use(model, *row):
            torch.testing.assert_close(mixed[i], answer(model, family)[i], **EXACT)
    assert not torch.allclose(mixed[0], answer(model, family)[0])


def prompt(family, row=None):
    """What a model continues: the whole batch, or one row of it."""
    batch = {key: value for key, value in FAMILIES[family].batch().items() if not key.startswith("decoder")}
    return batch if row is None else {key: value[row : row + 1] for key, value in batch.items()}


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {}],
    ids=["beams", "beams and sequences", "greedy"],
)
@pytest.mark.parametrize("family", GENERATES)
def test_generated_rows_equal_rows_alone(family, options):
    model = two(family)
    rows = [("one",), ("one", "two"), ()]
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}

    with veneer.use(model, rows=rows):
        mixed = model.generate(**prompt(family), **fixed)
    each = options.get("num_return_sequences", 1)
    assert len(mixed) == 3 * each
    for i, names in enumerate(rows):
        with veneer.use(model, *names):
            alone = model.generate(**prompt(family, row=i), **fixed)
        assert torch.equal(mixed[i * each : (i + 1) * each], alone)
    with veneer.use(model):
        assert not torch.equal(mixed, model.generate(**prompt(family), **fixed)), (
            "the adapters change no token, so this shows nothing"
        )


@pytest.mark.parametrize("family", GENERATES)
def test_sampled_sequences_follow_their_row(family):
    """With top_k=1 sampling is greedy, so each of the three sequences of a row is that row generated alone."""
    model = two(family)
    rows = ["two", None, "one"]
    fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    with veneer.use(model, rows=rows):
        mixed = model.generate(**prompt(family), **fixed)
    for i, name in enumerate(rows):
        with veneer.use(model, *([name] if name else [])):
            alone = model.generate(**prompt(family, row=i), **fixed)
        assert torch.equal(mixed[3 * i : 3 * i + 3], alone)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_a_wrong_number_of_rows(count):
    model = two()
    rows = (["one", None] * 3)[:count]
    with pytest.raises(errors.RoutingError) as caught, veneer.use(model, rows=rows):
        answer(model)
    assert f"rows names {count} rows but a batch of 3 reached model.layers.0.self_attn.q_proj" in str(caught.value)
    assert torch.equal(answer(model), acting(model, "two"))


def test_no_rows_at_all():
    model = two()
    with pytest.raises(errors.VeneerError), veneer.use(model, rows=[]):
        answer(model)


def test_rows_need_no_split_where_all_have_the_same():
    model = two()
    torch.testing.assert_close(acting(model, rows=["one"] * 3), acting(model, "one"), **EXACT)
    assert torch.equal(acting(model, rows=[None] * 3), answer(FAMILIES["llama"].model()))


def test_rows_cannot_differ_in_a_weight_that_they_share():
    model = FAMILIES["llama"].model()
    perturb(veneer.attach(model, veneer.FullFineTuning(), "norm", name="one"))
    with pytest.raises(errors.RoutingError, match=r"model\.norm\.weight is changed as a weight"):
        acting(model, rows=["one", None, "one"])
    assert torch.equal(acting(model), answer(FAMILIES["llama"].model())), "a shadow stayed"


def test_rows_train_both_adapters():
    """One mixed batch gives each adapter the gradients of its own rows, run apart."""
    model = two()
    one, other = veneer.adapters(model).values()

    def gradients(adapter, rows):
        model.zero_grad()
        out = logits(model, FAMILIES["llama"].batch())
        out[rows].pow(2).sum().backward()
        return [p.grad.clone() for p in adapter.parameters()]

    veneer.activate(model, "one")
    wanted = gradients(one, [0])
    veneer.activate(model, "two")
    wanted_other = gradients(other, [2])
    veneer.activate(model, rows=["one", None, "two"])
    mixed = gradients(one, [0, 1, 2])
    mixed_other = [p.grad for p in other.parameters()]
    for a, b in zip(mixed + mixed_other, wanted + wanted_other, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
        assert a.abs().max() > 0


# Attaching and detaching beside others


def test_a_second_adapter_does_not_change_the_first():
    model = FAMILIES["llama"].model()
    one = veneer.attach(model, veneer.LoRA(rank=2), name="one")
    perturb(one)
    before = answer(model)
    stored = {key: t.clone() for key, t in one.state_dict().items()}
    second = veneer.attach(model, veneer.LoRA(rank=3, bias="none"), "attention", name="two", also_train=["norm"])
    perturb(second)
    assert torch.equal(acting(model, "one"), before)
    veneer.detach(model, "two")
    veneer.activate(model, "one")
    assert torch.equal(answer(model), before)
    assert all(torch.equal(t, stored[key]) for key, t in one.state_dict().items())
    assert not second.attached
    assert one.attached


def test_detaching_the_active_one_leaves_the_base():
    model = two()
    veneer.detach(model, "two")
    assert torch.equal(answer(model), answer(FAMILIES["llama"].model()))
    assert trains(model) == {"one": {False}}


def test_detaching_takes_the_name_out_of_rows():
    model = two()
    veneer.activate(model, rows=["one", ("one", "two"), "two"])
    veneer.detach(model, "two")
    mixed = answer(model)
    torch.testing.assert_close(mixed[:2], acting(model, "one")[:2], **EXACT)
    torch.testing.assert_close(mixed[2], acting(model)[2], **EXACT)


def test_a_detached_handle_is_unknown():
    model = two()
    one = veneer.adapters(model)["one"]
    veneer.detach(model, one)
    for call in (veneer.activate, veneer.detach, veneer.merge, veneer.unmerge):
        with pytest.raises(errors.UnknownAdapter, match="has no adapter 'one'"):
            call(model, one)
    again = veneer.attach(model, veneer.LoRA(rank=2), name="one")
    with pytest.raises(errors.UnknownAdapter):
        veneer.detach(model, one)  # the old handle is not the new adapter
    veneer.detach(model, again)


def test_a_name_detached_inside_use_does_not_come_back():
    model = two()
    with veneer.use(model, "one"):
        veneer.detach(model, "two")  # which acted before
    assert torch.equal(answer(model), answer(FAMILIES["llama"].model()))
    veneer.attach(model, veneer.LoRA(rank=2), name="three")
    veneer.activate(model, "one")
    assert "two" not in veneer.adapters(model)["one"].summary()


def test_requires_grad_returns_with_the_last_detach():
    model = FAMILIES["llama"].model()
    frozen = [p for i, p in enumerate(model.parameters()) if i % 3 == 0]
    for parameter in frozen:
        parameter.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    assert len(set(wanted.values())) == 2
    for name in ("one", "two"):
        veneer.attach(model, veneer.LoRA(rank=2), name=name)
    veneer.detach(model, "one")
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in wanted)
    veneer.detach(model, "two")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert "_veneer" not in vars(model)


def test_use_on_a_model_without_adapters():
    model = FAMILIES["llama"].model()
    with veneer.use(model):
        assert not torch.is_grad_enabled()
    veneer.activate(model)
    assert all(p.requires_grad for p in model.parameters())
    assert veneer.adapters(model) == {}
