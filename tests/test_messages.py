"""What Veneer says: `check` on code that goes round an adapter, and messages word for word."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, IDS, perturb, text
from torch import nn

import veneer
from veneer import errors

LORA = veneer.LoRA(rank=2)


class Round(nn.Module):
    """Calls one layer and reads the weight of the other, as some attention code does."""

    def __init__(self):
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight, self.read.bias)


def test_check_names_what_never_ran():
    model = Round()
    batch = {"x": torch.ones(2, 4)}
    perturb(veneer.attach(model, LORA, "*"))
    assert veneer.check(model, batch) == ["read"]
    assert veneer.check(model, batch) == ["read"], "the first check left something behind"
    assert not any(d._forward_hooks for d in model.modules() if isinstance(d, veneer.Delta))


@pytest.mark.parametrize("family", FAMILIES)
def test_check_is_content_where_all_run(family):
    model = FAMILIES[family].model()
    veneer.attach(model, LORA)
    assert veneer.check(model, FAMILIES[family].batch()) == []


def test_check_looks_at_whoever_acts():
    model = Round()
    batch = {"x": torch.ones(2, 4)}
    assert veneer.check(model, batch) == []
    veneer.attach(model, LORA, "read", name="one")
    veneer.attach(model, LORA, "called", name="two")
    assert veneer.check(model, batch) == []
    veneer.activate(model, "one", "two")
    assert veneer.check(model, batch) == ["read"]
    veneer.activate(model, rows=["one", "two"])
    assert veneer.check(model, batch) == ["read"]
    veneer.activate(model)
    assert veneer.check(model, batch) == []


def test_check_of_a_merged_adapter():
    """A merged adapter acts through the weights, also where code goes round the layer."""
    model = Round()
    veneer.attach(model, LORA, "*")
    veneer.merge(model, "default")
    assert veneer.check(model, {"x": torch.ones(2, 4)}) == []


def test_check_cleans_up_after_an_error():
    model = Round()
    veneer.attach(model, LORA, "*")
    with pytest.raises(RuntimeError):
        veneer.check(model, {"x": torch.ones(2, 3)})
    assert not any(d._forward_hooks for d in model.modules() if isinstance(d, veneer.Delta))


def llama(**adapters):
    model = FAMILIES["llama"].model()
    for name, method in adapters.items():
        veneer.attach(model, method, name=name)
    return model


def bad_rows():
    model = llama(one=LORA)
    with veneer.use(model, rows=["one", None]):
        model(**text(IDS))


def tied():
    model = FAMILIES["gpt2"].model()
    veneer.attach(model, LORA, "head")
    veneer.merge(model, "default")


ROLES = (
    "attention, attention.q, attention.k, attention.v, attention.o, cross_attention, cross_attention.q, "
    "cross_attention.k, cross_attention.v, cross_attention.o, mlp, mlp.gate, mlp.up, mlp.down, linear, block, "
    "embedding, input, head, norm"
)

MESSAGES = [
    (
        errors.NoSuchPlace,
        lambda folder: veneer.attach(llama(), LORA, "q_prj"),
        "No module of LlamaForCausalLM matches where='q_prj'. Closest: model.layers.0.self_attn.q_proj, "
        f"model.layers.0.self_attn.v_proj, model.layers.0.self_attn.o_proj. Roles: {ROLES}.",
    ),
    (
        errors.NoSuchPlace,
        lambda folder: veneer.attach(llama(), LORA, "cross_attention.q"),
        f"LlamaForCausalLM has no cross_attention.q. Roles: {ROLES}; or name modules by a glob, such as "
        "where='*.q_proj'.",
    ),
    (
        errors.NoSuchPlace,
        lambda folder: veneer.attach(llama(), LORA, "mlp.act_fn"),
        "where='mlp.act_fn' names model.layers.0.mlp.act_fn (SiLUActivation), model.layers.1.mlp.act_fn "
        "(SiLUActivation) of LlamaForCausalLM, on which this method does not act. Name layers inside, such as "
        "where='mlp.act_fn.*'.",
    ),
    (
        errors.PlaceError,
        lambda folder: veneer.attach(llama(one=LORA), LORA, name="one"),
        "The model already has an adapter 'one'. Detach it first, or choose another name.",
    ),
    (
        errors.PlaceError,
        lambda folder: veneer.attach(llama(), LORA, name="my adapter"),
        "An adapter cannot be named 'my adapter'. Use letters, digits, '_' and '-', starting with a letter, and no "
        "word that modules use for themselves.",
    ),
    (
        errors.Overlap,
        lambda folder: veneer.attach(llama(), {"q_proj": LORA, "attention.q": veneer.LoRA(rank=4)}),
        "LoRA (where='q_proj') and LoRA (where='attention.q') both claim model.layers.0.self_attn.q_proj. Pass a tuple "
        "to stack them, in order.",
    ),
    (
        errors.UnreadableModel,
        lambda folder: veneer.attach(Round(), LORA, "attention"),
        "Round is no transformers model, so its roles cannot be read. Name the modules by a glob, such as "
        "where='*.q_proj'.",
    ),
    (
        errors.MethodError,
        lambda folder: veneer.LoRA(rank=0),
        "LoRA(rank=0): rank should be greater than or equal to 1.",
    ),
    (
        errors.MethodError,
        lambda folder: veneer.LoRA(rank=True),
        "LoRA(rank=True): rank should be a valid integer.",
    ),
    (
        errors.MethodError,
        lambda folder: veneer.LoRA(init="zeros"),
        "LoRA(init='zeros'): init should be 'kaiming', 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_16', 'olora', "
        "'loftq' or 'eva'.",
    ),
    (
        errors.MethodError,
        lambda folder: veneer.attach(llama(), veneer.LoRA(bias="lora_only")),
        "bias='lora_only' would train nothing: no adapted layer has a bias. Use bias='none'.",
    ),
    (
        errors.UnknownAdapter,
        lambda folder: veneer.activate(llama(french=LORA, german=LORA), "frensh"),
        "LlamaForCausalLM has no adapter 'frensh'. Closest: french. It has: french, german.",
    ),
    (
        errors.NotMergeable,
        lambda folder: tied(),
        "transformer.wte.weight is tied to lm_head.weight, which merging would change too. Untie them first, or keep "
        "the adapter attached.",
    ),
    (
        errors.OptimizerError,
        lambda folder: veneer.optimizer(veneer.attach(llama(), LORA), "paged-bitsandbytes", lr=0.1),
        "bitsandbytes pages nothing on a CPU, and elsewhere only tensors of 100,000 elements or more: 0.0% of what "
        "'default' trains. Take 'paged', which pages all.",
    ),
    (
        errors.RoutingError,
        lambda folder: bad_rows(),
        "rows names 2 rows but a batch of 3 reached model.layers.0.self_attn.q_proj. Give one entry a row of the "
        "batch, in its order.",
    ),
    (
        errors.FileError,
        lambda folder: veneer.load(llama(), folder),
        "{folder} holds no adapter: neither veneer.json nor adapter_config.json is there.",
    ),
    (
        errors.FileError,
        lambda folder: veneer.load(llama(), folder / "absent"),
        "{folder}/absent is no folder and no Hub id of the form 'owner/name'.",
    ),
]


@pytest.mark.parametrize(
    ("kind", "call", "message"), MESSAGES, ids=[f"{kind.__name__}-{i}" for i, (kind, *_) in enumerate(MESSAGES)]
)
def test_message(kind, call, message, tmp_path):
    with pytest.raises(kind) as caught:
        call(tmp_path)
    assert type(caught.value) is kind
    assert str(caught.value) == message.replace("{folder}", str(tmp_path))
    assert isinstance(caught.value, errors.VeneerError)


def test_every_error_is_one_of_ours():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, veneer.VeneerError) for kind in kinds)
    assert all(kind.__doc__ for kind in kinds)
    value_errors = {kind for kind in kinds if issubclass(kind, ValueError)}
    assert value_errors == set(kinds) - {
        veneer.VeneerError,
        errors.MissingSample,
        errors.RunError,
        errors.Diverged,
        errors.Stopped,
    }


def test_closest_and_listed():
    paths = ["a.b.q_proj", "a.c.q_proj", "a.b.v_proj"]
    assert errors.closest("q_prj", paths) == " Closest: a.b.q_proj, a.b.v_proj."
    assert errors.closest("b.q_prj", paths) == " Closest: a.b.q_proj, a.c.q_proj, a.b.v_proj."
    assert errors.closest("zzz", paths) == ""
    assert errors.closest("one", []) == ""
    assert errors.listed("abcd") == "a, b, c, d"
    assert errors.listed("abcdef") == "a, b, c, d and 2 more"
    assert errors.listed("abc", 1) == "a and 2 more"
    assert errors.listed([]) == ""
