"""Where: what each text names on each family of models, and what an error says of a text that names nothing."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, logits
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer import errors, places
from veneer.seams import anatomy

LORA = veneer.LoRA(rank=2)
ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"


def paths(model, where, method=LORA):
    return [claim.place.path for claim in veneer.attach(model, method, where).claims]


def blocks(*templates):
    """Every template in each of the two blocks."""
    return [template.format(block) for block in range(2) for template in templates]


def t5(encoder, decoder):
    return blocks(*(f"encoder.block.{{}}.{e}" for e in encoder)) + blocks(*(f"decoder.block.{{}}.{d}" for d in decoder))


def t5_mlp(*names):
    return t5([f"layer.1.DenseReluDense.{n}" for n in names], [f"layer.2.DenseReluDense.{n}" for n in names])


LLAMA, GPT2, BERT, VIT = "model.layers.{}.", "transformer.h.{}.", "bert.encoder.layer.{}.", "vit.layers.{}."
SELF, CROSS = "layer.0.SelfAttention.", "layer.1.EncDecAttention."


def whisper(encoder, decoder):
    sides = ((side, name) for side, names in (("encoder", encoder), ("decoder", decoder)) for name in names)
    return [f"model.{side}.layers.{block}.{name}" for side, name in sides for block in range(2)]


EXPECTED = {
    "llama": {
        "attention": blocks(*(f"{LLAMA}self_attn.{r}_proj" for r in "qkvo")),
        "mlp": blocks(*(f"{LLAMA}mlp.{r}_proj" for r in ("gate", "up", "down"))),
        "embedding": ["model.embed_tokens"],
        "head": ["lm_head"],
        **{f"attention.{r}": blocks(f"{LLAMA}self_attn.{r}_proj") for r in "qkvo"},
        **{f"mlp.{r}": blocks(f"{LLAMA}mlp.{r}_proj") for r in ("gate", "up", "down")},
    },
    "gpt2": {
        "attention": blocks(*(f"{GPT2}attn.c_attn[{r}]" for r in "qkv"), f"{GPT2}attn.c_proj"),
        "mlp": blocks(f"{GPT2}mlp.c_fc", f"{GPT2}mlp.c_proj"),
        "embedding": ["transformer.wte"],
        "head": ["lm_head"],
        **{f"attention.{r}": blocks(f"{GPT2}attn.c_attn[{r}]") for r in "qkv"},
        "attention.o": blocks(f"{GPT2}attn.c_proj"),
        "mlp.up": blocks(f"{GPT2}mlp.c_fc"),
        "mlp.down": blocks(f"{GPT2}mlp.c_proj"),
    },
    "bert": {
        "attention": blocks(
            *(f"{BERT}attention.self.{n}" for n in ("query", "key", "value")), f"{BERT}attention.output.dense"
        ),
        "mlp": blocks(f"{BERT}intermediate.dense", f"{BERT}output.dense"),
        "embedding": ["bert.embeddings.word_embeddings"],
        "head": ["cls.predictions.decoder"],
        "attention.q": blocks(f"{BERT}attention.self.query"),
        "attention.k": blocks(f"{BERT}attention.self.key"),
        "attention.v": blocks(f"{BERT}attention.self.value"),
        "attention.o": blocks(f"{BERT}attention.output.dense"),
        "mlp.up": blocks(f"{BERT}intermediate.dense"),
        "mlp.down": blocks(f"{BERT}output.dense"),
    },
    "t5": {
        "attention": t5([f"{SELF}{r}" for r in "qkvo"], [f"{SELF}{r}" for r in "qkvo"]),
        "cross_attention": t5([], [f"{CROSS}{r}" for r in "qkvo"]),
        "mlp": t5_mlp("wi_0", "wi_1", "wo"),
        "embedding": ["encoder.embed_tokens", "decoder.embed_tokens"],
        "head": ["lm_head"],
        **{f"attention.{r}": t5([f"{SELF}{r}"], [f"{SELF}{r}"]) for r in "qkvo"},
        **{f"cross_attention.{r}": t5([], [f"{CROSS}{r}"]) for r in "qkvo"},
        "mlp.gate": t5_mlp("wi_0"),
        "mlp.up": t5_mlp("wi_1"),
        "mlp.down": t5_mlp("wo"),
    },
    "vit": {
        "attention": blocks(*(f"{VIT}attention.{r}_proj" for r in "qkvo")),
        "mlp": blocks(f"{VIT}mlp.fc1", f"{VIT}mlp.fc2"),
        **{f"attention.{r}": blocks(f"{VIT}attention.{r}_proj") for r in "qkvo"},
        "mlp.up": blocks(f"{VIT}mlp.fc1"),
        "mlp.down": blocks(f"{VIT}mlp.fc2"),
    },
    "albert": {
        "attention": [f"{ALBERT}.attention.{n}" for n in ("query", "key", "value", "dense")],
        "mlp": [f"{ALBERT}.ffn", f"{ALBERT}.ffn_output"],
        "embedding": ["albert.embeddings.word_embeddings"],
        "head": ["predictions.decoder"],
        "attention.q": [f"{ALBERT}.attention.query"],
        "attention.k": [f"{ALBERT}.attention.key"],
        "attention.v": [f"{ALBERT}.attention.value"],
        "attention.o": [f"{ALBERT}.attention.dense"],
        "mlp.up": [f"{ALBERT}.ffn"],
        "mlp.down": [f"{ALBERT}.ffn_output"],
    },
    "whisper": {
        "attention": whisper(*[[f"self_attn.{r}_proj" for r in ("q", "k", "v", "out")]] * 2),
        "cross_attention": whisper([], [f"encoder_attn.{r}_proj" for r in ("q", "k", "v", "out")]),
        "mlp": whisper(["fc1", "fc2"], ["fc1", "fc2"]),
        "embedding": ["model.decoder.embed_tokens"],
        "head": ["proj_out"],
        **{f"attention.{r}": whisper(*[[f"self_attn.{r}_proj"]] * 2) for r in "qkv"},
        **{f"cross_attention.{r}": whisper([], [f"encoder_attn.{r}_proj"]) for r in "qkv"},
        "attention.o": whisper(["self_attn.out_proj"], ["self_attn.out_proj"]),
        "cross_attention.o": whisper([], ["encoder_attn.out_proj"]),
        "mlp.up": whisper(["fc1"], ["fc1"]),
        "mlp.down": whisper(["fc2"], ["fc2"]),
    },
}
EXPECTED["gemma3"] = EXPECTED["llama"]
EXPECTED["mixtral"] = {role: found for role, found in EXPECTED["llama"].items() if not role.startswith("mlp")}
LINEAR = {
    "llama": EXPECTED["llama"]["attention"] + EXPECTED["llama"]["mlp"],
    "gpt2": blocks(f"{GPT2}attn.c_attn", f"{GPT2}attn.c_proj", f"{GPT2}mlp.c_fc", f"{GPT2}mlp.c_proj"),
    "bert": EXPECTED["bert"]["attention"] + EXPECTED["bert"]["mlp"],
    "t5": EXPECTED["t5"]["attention"] + EXPECTED["t5"]["cross_attention"] + EXPECTED["t5"]["mlp"],
    "vit": EXPECTED["vit"]["attention"] + EXPECTED["vit"]["mlp"],
    "albert": EXPECTED["albert"]["attention"] + EXPECTED["albert"]["mlp"],
    "gemma3": EXPECTED["gemma3"]["attention"] + EXPECTED["gemma3"]["mlp"],
    "whisper": EXPECTED["whisper"]["attention"] + EXPECTED["whisper"]["cross_attention"] + EXPECTED["whisper"]["mlp"],
    "mixtral": EXPECTED["mixtral"]["attention"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_roles(family):
    model = FAMILIES[family].model()
    for role in places.ROLES:
        if role in ("linear", "block"):
            found = places.find(model, role, "weight")
            assert sorted(place.path for place in found) == sorted(LINEAR[family])
        elif role in EXPECTED[family]:
            found = [place.path for place in places.find(model, role, "weight")]
            assert sorted(found) == sorted(EXPECTED[family][role]), role
            assert len(set(found)) == len(found)
        else:
            with pytest.raises(errors.NoSuchPlace, match=rf"^{type(model).__name__} has no {role}\. Roles: "):
                places.find(model, role, "weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_named_means_linear_without_head(family):
    model = FAMILIES[family].model()
    assert sorted(paths(model, None)) == sorted(LINEAR[family])


def test_places_come_in_the_order_of_the_model():
    assert paths(FAMILIES["llama"].model(), "mlp.down | attention.v | attention.q") == blocks(
        f"{LLAMA}self_attn.q_proj", f"{LLAMA}self_attn.v_proj", f"{LLAMA}mlp.down_proj"
    )


def test_a_role_still_means_the_same_after_an_adapter_is_there():
    model = FAMILIES["gpt2"].model()
    first = veneer.attach(model, LORA, "attention", name="one")
    second = veneer.attach(model, LORA, "attention", name="two")
    assert [c.place.path for c in first.claims] == [c.place.path for c in second.claims]
    assert sorted(c.place.path for c in veneer.attach(model, LORA, name="three").claims) == sorted(LINEAR["gpt2"])


# Fused projections


@pytest.mark.parametrize(("role", "start"), [("q", 0), ("k", 32), ("v", 64)])
def test_a_fused_role_changes_only_its_own_rows(role, start):
    model = FAMILIES["gpt2"].model()
    weight = model.transformer.h[0].attn.c_attn.weight
    before = weight.clone()
    adapter = veneer.attach(model, LORA, f"attention.{role}")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(0.5)
    assert adapter.claims[0].place.spans == ((start, start + 32),)
    assert adapter.claims[0].place.shape == (32, 32)
    veneer.merge(model, adapter)
    changed = (weight != before).all(dim=0)  # stored [in, out]
    assert changed.nonzero().flatten().tolist() == list(range(start, start + 32))


def test_fused_roles_do_not_overlap_each_other_but_the_whole():
    model = FAMILIES["gpt2"].model()
    veneer.attach(model, {"attention.q": LORA, "attention.v": veneer.LoRA(rank=4)}, name="fine")
    with pytest.raises(errors.Overlap, match=r"both claim transformer\.h\.0\.attn\.c_attn"):
        veneer.attach(model, {"attention.q": LORA, "c_attn": veneer.LoRA(rank=4)}, name="not")


# Globs, regexes, unions


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("q_proj", blocks(f"{LLAMA}self_attn.q_proj")),
        ("*.q_proj", blocks(f"{LLAMA}self_attn.q_proj")),
        ("self_attn.q_proj", blocks(f"{LLAMA}self_attn.q_proj")),
        ("*_proj", LINEAR["llama"]),
        ("[qk]_proj", None),  # brackets are no character class: they label roles of fused weights
        ("?_proj", EXPECTED["llama"]["attention"]),
        ("layers.1.*", [path for path in LINEAR["llama"] if ".1." in path]),
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        ("lm_head", ["lm_head"]),
        ("*", ["model.embed_tokens", *LINEAR["llama"], "lm_head"]),
        ("proj", None),
        ("_proj", None),
        ("q_pro", None),
        ("attn.q_proj", None),
        ("head", ["lm_head"]),  # the role, not an ending
        ("re:.*q_proj", blocks(f"{LLAMA}self_attn.q_proj")),
        ("re:.*[qv]_proj", blocks(f"{LLAMA}self_attn.q_proj", f"{LLAMA}self_attn.v_proj")),
        ("re:.*(q|v)_proj", blocks(f"{LLAMA}self_attn.q_proj", f"{LLAMA}self_attn.v_proj")),
        ("re:q_proj", None),  # the whole path
        ("re:.*q_pro", None),
        ("q_proj | v_proj", blocks(f"{LLAMA}self_attn.q_proj", f"{LLAMA}self_attn.v_proj")),
        ("q_proj|v_proj", blocks(f"{LLAMA}self_attn.q_proj", f"{LLAMA}self_attn.v_proj")),
        ("q_proj | attention.q | *.q_proj", blocks(f"{LLAMA}self_attn.q_proj")),
        ("q_proj | lm_head", [*blocks(f"{LLAMA}self_attn.q_proj"), "lm_head"]),
        ("q_proj | q_prj", None),  # every part must name something
        (["q_proj", "attention.v"], blocks(f"{LLAMA}self_attn.q_proj", f"{LLAMA}self_attn.v_proj")),
        (("lm_head",), ["lm_head"]),
        (["lm_head", "re:.*q_proj"], [*blocks(f"{LLAMA}self_attn.q_proj"), "lm_head"]),
        (["re:.*q_proj", "lm_head"], [*blocks(f"{LLAMA}self_attn.q_proj"), "lm_head"]),
        (
            ["lm_head", "re:.*(q|v)_proj"],
            [*blocks(f"{LLAMA}self_attn.q_proj", f"{LLAMA}self_attn.v_proj"), "lm_head"],
        ),
        ("", None),
        ("   ", None),
        ([], None),
        ("q_proj |", None),
    ],
    ids=str,
)
def test_texts(where, expected):
    model = FAMILIES["llama"].model()
    if expected is None:
        with pytest.raises(errors.NoSuchPlace):
            veneer.attach(model, LORA, where)
        assert not veneer.adapters(model)
        assert all(p.requires_grad for p in model.parameters())
    else:
        assert sorted(paths(model, where)) == sorted(expected)


def test_no_regex():
    with pytest.raises(errors.PlaceError, match=r"'re:\(' is no regular expression: .*\. Check its brackets"):
        veneer.attach(FAMILIES["llama"].model(), LORA, "re:(")


def test_a_mapping_and_a_where_at_once():
    with pytest.raises(errors.PlaceError, match="A mapping says where each method goes"):
        veneer.attach(FAMILIES["llama"].model(), {"q_proj": LORA}, "v_proj")


def test_a_mapping_gives_each_its_own():
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, {"q_proj": veneer.LoRA(rank=2), "v_proj": veneer.LoRA(rank=5)})
    assert {c.place.path.rpartition(".")[2]: c.method.rank for c in adapter.claims} == {"q_proj": 2, "v_proj": 5}


@pytest.mark.parametrize(
    ("family", "where", "near"),
    [
        ("llama", "q_prj", "q_proj"),
        ("llama", "self_attn.q_prj", "self_attn.q_proj"),
        ("llama", "model.layers.0.self_attn.q_prj", "model.layers.0.self_attn.q_proj"),
        ("gpt2", "c_atn", "attn.c_attn"),
        ("bert", "querry", "self.query"),
    ],
)
def test_a_typo_names_what_is_near(family, where, near):
    with pytest.raises(errors.NoSuchPlace) as caught:
        veneer.attach(FAMILIES[family].model(), LORA, where)
    message = str(caught.value)
    assert f"matches where='{where}'" in message
    assert near in message.partition("Closest: ")[2].partition(" Roles")[0]


def test_a_typo_in_also_train_names_the_module():
    with pytest.raises(errors.NoSuchPlace) as caught:
        veneer.attach(FAMILIES["llama"].model(), LORA, also_train=["lm_haed"])
    assert "lm_haed" in str(caught.value)
    assert "re:" not in str(caught.value), "the message speaks of a regex that nobody wrote"


def test_a_container_says_what_to_name():
    with pytest.raises(errors.NoSuchPlace) as caught:
        veneer.attach(FAMILIES["llama"].model(), LORA, "self_attn")
    assert "model.layers.0.self_attn (LlamaAttention)" in str(caught.value)
    assert "Name layers inside, such as where='self_attn.*'" in str(caught.value)
    assert sorted(paths(FAMILIES["llama"].model(), "self_attn.*")) == sorted(EXPECTED["llama"]["attention"])


def test_a_norm_has_no_matrix():
    with pytest.raises(errors.NoSuchPlace, match=r"model\.norm \(LlamaRMSNorm\)"):
        veneer.attach(FAMILIES["llama"].model(), LORA, "model.norm")


# Overlaps


def test_two_methods_on_one_weight_are_refused():
    model = FAMILIES["llama"].model()
    with pytest.raises(errors.Overlap) as caught:
        veneer.attach(model, {"attention.q": LORA, "self_attn": veneer.FullFineTuning()})
    assert str(caught.value) == (
        "LoRA (where='attention.q') and FullFineTuning (where='self_attn') both claim "
        "model.layers.0.self_attn.q_proj.weight. Pass a tuple to stack them, in order."
    )
    assert not veneer.adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_two_methods_on_one_weight_are_refused_in_either_order():
    for where in ("self_attn", "q_proj"):
        model = FAMILIES["llama"].model()
        with pytest.raises(errors.Overlap, match=r"both claim model\.layers\.0\.self_attn\.q_proj"):
            veneer.attach(model, {where: veneer.FullFineTuning(), "attention.q": LORA})


def test_also_train_overlaps_too():
    with pytest.raises(errors.Overlap, match="both claim lm_head"):
        veneer.attach(FAMILIES["llama"].model(), LORA, "lm_head", also_train=["lm_head"])


def test_a_tuple_stacks():
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, (veneer.FullFineTuning(), LORA), "q_proj")
    assert [type(c.method).__name__ for c in adapter.claims] == ["FullFineTuning"] * 2 + ["LoRA"] * 2
    batch = FAMILIES["llama"].batch()
    copies = [c.delta for c in adapter.claims[:2]]
    pairs = [c.delta for c in adapter.claims[2:]]
    with torch.no_grad():
        base = logits(model, batch)
        for copy in copies:
            copy.value.mul_(2)
        doubled = logits(model, batch)
        for pair in pairs:
            nn.init.ones_(pair.B)
        both = logits(model, batch)
    assert not torch.equal(base, doubled)
    assert not torch.equal(doubled, both)


def test_two_separate_adapters_may_share_a_place():
    model = FAMILIES["llama"].model()
    veneer.attach(model, LORA, "q_proj", name="one")
    veneer.attach(model, veneer.FullFineTuning(), "q_proj", name="two")
    assert list(veneer.adapters(model)) == ["one", "two"]


# Shared and tied


def test_shared_modules_are_seen_once():
    """ALBERT runs one layer again and again: one place, one delta, and it acts in every run."""
    model = FAMILIES["albert"].model()
    assert model.config.num_hidden_layers > 1
    adapter = veneer.attach(model, LORA, "attention.q")
    assert len(adapter.claims) == 1
    ran = []
    adapter.claims[0].delta.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        logits(model, FAMILIES["albert"].batch())
    assert len(ran) == model.config.num_hidden_layers


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.third = nn.Linear(4, 4)
        self.third.weight = self.first.weight

    def forward(self, x):
        return self.third(self.second(self.first(x)))


def test_one_module_under_two_names():
    adapter = veneer.attach(Twice(), LORA, "*")
    assert [c.place.path for c in adapter.claims] == ["first", "third"]


def test_a_shared_parameter_trained_whole_stays_shared():
    model = Twice()
    adapter = veneer.attach(model, veneer.FullFineTuning(), "re:.*weight")
    assert [c.place.path for c in adapter.claims] == ["first.weight"]
    assert [other.path for other in adapter.claims[0].place.tied] == ["third.weight"]
    with torch.no_grad():
        adapter.claims[0].delta.value.zero_()
    assert torch.equal(model(torch.ones(1, 4)), model.third.bias.expand(1, 4))


def test_tied_embedding_and_head_are_two_places_for_lora_and_one_trained_whole():
    model = FAMILIES["gpt2"].model()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert paths(model, "embedding") == ["transformer.wte"]
    veneer.detach(model, "default")
    assert paths(model, "head") == ["lm_head"]
    veneer.detach(model, "default")
    adapter = veneer.attach(model, veneer.FullFineTuning(), "embedding | head")
    assert len(adapter.claims) == 1
    assert len(adapter.claims[0].place.tied) == 1


def test_full_fine_tuning_names_every_parameter_below():
    assert paths(FAMILIES["gpt2"].model(), "transformer.h.1.mlp", veneer.FullFineTuning()) == [
        "transformer.h.1.mlp.c_fc.weight",
        "transformer.h.1.mlp.c_fc.bias",
        "transformer.h.1.mlp.c_proj.weight",
        "transformer.h.1.mlp.c_proj.bias",
    ]


# Models that are not transformers'


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
        self.out = nn.Linear(4, 2)


def test_a_plain_model_has_no_roles_but_globs():
    for role in ("attention", "attention.q", "mlp", "mlp.up", "cross_attention"):
        with pytest.raises(errors.UnreadableModel) as caught:
            veneer.attach(Plain(), LORA, role)
        assert str(caught.value) == (
            "Plain is no transformers model, so its roles cannot be read. Name the modules by a glob, such as "
            "where='*.q_proj'."
        )
    for role in ("embedding", "head"):
        with pytest.raises(errors.NoSuchPlace, match=f"Plain has no {role}"):
            veneer.attach(Plain(), LORA, role)
    assert paths(Plain(), None) == ["layers.0.0", "layers.1.0"]
    assert paths(Plain(), "out") == ["out"]


def test_no_blocks_at_all():
    with pytest.raises(errors.NoSuchPlace, match=r"Sequential has no linear layer inside a ModuleList of blocks"):
        veneer.attach(nn.Sequential(nn.Linear(2, 2)), LORA)


def test_a_forward_that_cannot_be_probed_says_so(monkeypatch):
    model = FAMILIES["llama"].model()
    monkeypatch.setattr(type(model.model), "forward", lambda self, *args, **kwargs: 1 / 0)
    with pytest.raises(errors.UnreadableModel) as caught:
        veneer.attach(model, LORA, "attention.q")
    assert "a probe forward stopped with ZeroDivisionError" in str(caught.value)
    assert len(paths(model, "*.q_proj")) == 2


def test_a_child_of_the_sites_name_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].add_module("adapters", nn.Identity())
    with pytest.raises(errors.PlaceError, match="0 has a child named 'adapters' of its own; rename it first"):
        veneer.attach(model, LORA, "0")
    assert not veneer.adapters(model)
    assert all(p.requires_grad for p in model.parameters())


# Without weights


def test_attach_on_meta_loads_nothing():
    """14 billion parameters: had anything been filled or copied, there would not be the memory."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=16, num_attention_heads=64, num_key_value_heads=8
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    adapter = veneer.attach(model, veneer.LoRA(rank=8), "attention.q | attention.v")
    assert all(t.is_meta for t in model.state_dict().values())
    assert all(p.is_meta for p in adapter.parameters())
    assert len(adapter.claims) == 32
    count = veneer.count_parameters(model)
    assert count.total > 13e9
    assert count.trainable == 16 * 8 * (8192 + 8192 + 8192 + 1024)
    veneer.detach(model, adapter)
    assert all(t.is_meta for t in model.state_dict().values())


def test_roles_are_read_off_the_base_alone():
    """The first adapter acts while the second one's roles are read; its A and B are no part of the anatomy."""
    model = FAMILIES["llama"].model()
    veneer.attach(model, LORA, "q_proj", name="first")
    second = veneer.attach(model, LORA, "attention.q | mlp.down", name="second")
    expected = blocks(f"{LLAMA}self_attn.q_proj", f"{LLAMA}mlp.down_proj")
    assert sorted(claim.place.path for claim in second.claims) == sorted(expected)
    parts = [part.parameter for role in ("attention", "mlp") for _, part in anatomy.read(model).parts(role)]
    assert parts
    assert not [path for path in parts if "adapters" in path]
    assert model._veneer.routes.active == ("second",)
