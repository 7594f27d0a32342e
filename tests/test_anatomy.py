"""The anatomy of many families: roles, ends, what stands in the way, the drawing, and the walk over all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import architectures
import pytest
import torch
import walk_architectures as walk
from tiny import FAMILIES

import veneer
from veneer import errors
from veneer.cli import diagram
from veneer.seams import anatomy, probe

DOCS = Path(__file__).parent.parent / "docs"


def first_block(model):
    """Of the first block that has it: role -> the weights below the block, with their spans."""
    read = anatomy.read(model)
    found = {}
    for sublayer in read.sublayers:
        block = read.block(sublayer.ends.blocks)
        for role, parts in sublayer.roles.items():
            key = sublayer.kind if sublayer.kind == "mixer" else f"{sublayer.kind}.{role}"
            names = [(p.parameter.removeprefix(f"{block}.").removesuffix(".weight"), p.spans) for p in parts]
            found.setdefault(key, names)
    return found


def plain(prefix, **roles):
    return {
        f"{prefix}.{role}": [(name, None) for name in ([names] if isinstance(names, str) else names)]
        for role, names in roles.items()
    }


def attention(prefix="self_attn.", names="q_proj k_proj v_proj o_proj", kind="attention"):
    return plain(kind, **dict(zip("qkvo", (prefix + name for name in names.split()), strict=True)))


def gated(prefix="mlp."):
    return plain("mlp", **{role: f"{prefix}{role}_proj" for role in ("gate", "up", "down")})


def rows(name, *spans):
    return [(name, spans)]


EXPERTS = {
    "mlp.gate": rows("mlp.experts.gate_up_proj", (0, 96)),
    "mlp.up": rows("mlp.experts.gate_up_proj", (96, 192)),
    "mlp.down": [("mlp.experts.down_proj", None)],
}
QKV, QKV_FALCON = "self_attn.qkv_proj", "self_attention.query_key_value"
EXPECTED = {
    "falcon": {
        "attention.q": rows(QKV_FALCON, (0, 64)),
        "attention.k": rows(QKV_FALCON, (64, 80)),
        "attention.v": rows(QKV_FALCON, (80, 96)),
        **plain("attention", o="self_attention.dense"),
        **plain("mlp", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    },
    "gptj": {
        **attention("attn.", "q_proj k_proj v_proj out_proj"),
        **plain("mlp", up="mlp.fc_in", down="mlp.fc_out"),
    },
    "cohere": {**attention(), **gated()},
    "mixtral": {**attention(), **EXPERTS},
    "gemma2": {**attention(), **gated()},
    "gemma3_text": {**attention(), **gated()},
    "olmo2": {**attention(), **gated()},
    "phi3": {
        "attention.q": rows(QKV, (0, 64)),
        "attention.k": rows(QKV, (64, 128)),
        "attention.v": rows(QKV, (128, 192)),
        **plain("attention", o="self_attn.o_proj"),
        "mlp.gate": rows("mlp.gate_up_proj", (0, 96)),
        "mlp.up": rows("mlp.gate_up_proj", (96, 192)),
        **plain("mlp", down="mlp.down_proj"),
    },
    "whisper": {
        **attention("self_attn.", "q_proj k_proj v_proj out_proj"),
        **attention("encoder_attn.", "q_proj k_proj v_proj out_proj", kind="cross_attention"),
        **plain("mlp", up="fc1", down="fc2"),
    },
    "deepseek_v3": {
        **plain("attention", q="self_attn.q_b_proj", o="self_attn.o_proj"),
        "attention.k": [
            ("self_attn.kv_a_proj_with_mqa", ((32, 48),)),  # the rotated part of the keys
            ("self_attn.kv_b_proj", ((0, 16), (32, 48), (64, 80), (96, 112))),
        ],
        "attention.v": rows("self_attn.kv_b_proj", (16, 32), (48, 64), (80, 96), (112, 128)),
        **gated(),
    },
    "xlm": {
        **attention("", "q_lin k_lin v_lin out_lin"),
        **plain("mlp", up="lin1", down="lin2"),
    },
    "mamba": {"mixer": [("mixer.out_proj", None)]},
    "deepseek_v4": {  # hyper-connections: no residual add to go by
        "mlp.down": [("mlp.experts.down_proj", None), ("mlp.shared_experts.down_proj", None)],
        "mlp.gate": [("mlp.experts.gate_up_proj", ((0, 96),)), ("mlp.shared_experts.gate_proj", None)],
    },
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_roles_of(model_type):
    found = first_block(architectures.build(model_type))
    if model_type == "deepseek_v4":
        found = {role: parts for role, parts in found.items() if role in EXPECTED[model_type]}
    assert found == EXPECTED[model_type]


def test_experts_beside_shared_ones_and_no_router():
    found = first_block(architectures.build("qwen2_moe"))
    names = [name for role, parts in found.items() if role.startswith("mlp") for name, _ in parts]
    assert {"mlp.experts.gate_up_proj", "mlp.shared_expert.gate_proj", "mlp.shared_expert.down_proj"} <= set(names)
    assert not [name for name in names if re.search(r"mlp\.gate$|shared_expert_gate", name)]


@pytest.mark.parametrize("model_type", ["gemma2", "bert", "falcon", "gptj", "mixtral", "whisper", "xlm", "olmo2"])
def test_sublayers_train(model_type):
    """Nothing added at every output leaves the model bit-equal; something there gets a gradient everywhere."""
    model = architectures.build(model_type).requires_grad_(False)
    batch = next(probe.candidates(model))
    with torch.no_grad():
        base = walk.answers(model, batch)
    found = walk.try_method(model, veneer.BottleneckAdapter(width=2, activation="tanh"), "block", batch, base)
    assert found["identity"]
    assert found["not reached"] == found["without gradient"] == 0
    per_block = 3 if model_type == "whisper" else 2
    assert found["places"] == (4 + 6 if model_type == "whisper" else 2 * per_block)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gemma3_text", "falcon"])
def test_on_meta(model_type):
    with torch.device("meta"):
        empty = architectures.build(model_type)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert anatomy.read(empty) == anatomy.read(architectures.build(model_type))


class AsksForNumbers:
    """What a model that looks at its numbers does to a probe without any."""

    def __init__(self, model):
        self.forward = model.model.forward

    def __call__(self, input_ids=None, **kwargs):
        input_ids.tolist()
        return self.forward(input_ids=input_ids, **kwargs)


def test_a_forward_that_asks_for_numbers_is_traced_with_them():
    model = FAMILIES["llama"].model().train()
    expected = anatomy.read(FAMILIES["llama"].model())
    model.model.forward = AsksForNumbers(model)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert anatomy.read(model) == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_without_numbers_it_says_why():
    with torch.device("meta"):
        model = architectures.build("llama")
    model.model.forward = AsksForNumbers(model)
    with pytest.raises(errors.UnreadableModel) as caught:
        veneer.attach(model, veneer.LoRA(rank=2), "attention.q")
    message = str(caught.value)
    assert message.startswith("The roles of LlamaForCausalLM could not be read: a probe forward stopped with ")
    assert re.search(r"after \d+ tensors, in model\. Hand over a batch that the model accepts, ", message)
    assert message.endswith("or name the modules by a glob, such as where='*.q_proj'.")


def test_an_example_is_traced_where_no_input_can_be_guessed(monkeypatch):
    model = FAMILIES["llama"].model()
    monkeypatch.setattr(probe, "candidates", lambda model: iter(()))
    with pytest.raises(errors.UnreadableModel, match="no input could be guessed from its config"):
        anatomy.read(model)
    read = anatomy.read(model, example=FAMILIES["llama"].batch())
    assert len(read.sublayers) == 4
    assert len(veneer.attach(model, veneer.LoRA(rank=2), "attention.q").claims) == 2


def test_weights_that_are_computed_at_every_read_are_no_places():
    """Under weight_norm a convolution has no weight of its own; a positional convolution of speech models is such."""
    model = architectures.build("wav2vec2")
    adapter = veneer.attach(model, veneer.LoRA(rank=2), "linear")
    assert len(adapter.claims) == 2 * 6
    assert not [one for one in veneer.places.weights(model) if "pos_conv" in one]


# The drawing


def test_inspect_draws_one_block_of_each_kind():
    drawn = "\n".join(diagram.lines(diagram.describe(architectures.build("mixtral"))))
    assert drawn.startswith("MixtralForCausalLM, ")
    assert "embedding  model.embed_tokens  64 x 128\n" in drawn
    assert "model.layers.0  and 1 alike, to model.layers.1\n" in drawn
    assert drawn.count("├─ attention, 2 key heads of 16") == drawn.count("├─ mlp") == 1
    assert "│  gate  mlp.experts.gate_up_proj  4 x 192 x 64  rows 0-96\n" in drawn
    assert "⊕◄ self_attn[0], 64 wide" in drawn
    assert drawn.endswith("head  lm_head  128 x 64")


def test_what_inspect_draws_is_json():
    found = json.loads(json.dumps(diagram.describe(architectures.build("t5"))))
    assert [block["stack"] for block in found["blocks"]] == ["encoder.block", "decoder.block"]
    kinds = [[sublayer["kind"] for sublayer in block["sublayers"]] for block in found["blocks"]]
    assert kinds == [["attention", "mlp"], ["attention", "cross_attention", "mlp"]]


# All of them


def stated():
    return json.loads((DOCS / "architectures.json").read_text())


def test_the_page_states_what_the_walk_found():
    written = stated()
    assert written["counts"] == walk.counts(written["results"])
    page = (DOCS / "architectures.md").read_text()
    for name, count in written["counts"].items():
        assert f"| {walk.MEANINGS[name]} | {count} |" in page
    for name, floor in walk.FLOORS.items():
        assert written["counts"][name] >= floor, name


# Families of every kind.
SAMPLE = [
    "albert", "bart", "bert", "blip", "bloom", "clip", "codegen", "cohere", "convbert", "deberta-v2",
    "deepseek_v3", "distilbert", "electra", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss",
    "gptj", "granitemoe", "jamba", "led", "llama", "mamba", "mbart", "mistral", "mixtral", "mpt", "olmo2", "opt",
    "phi3", "qwen2_moe", "qwen3", "roberta", "rt_detr", "t5", "vit", "wav2vec2", "whisper",
]  # fmt: skip


@pytest.mark.slow
def test_no_architecture_of_a_sample_falls_back():
    written = stated()["results"]
    for name, result in walk.walk(SAMPLE).items():
        for method in walk.METHODS:
            if walk.works(written[name], method):
                assert walk.works(result, method), (name, method, result.get(method, result))
        assert set(written[name].get("roles", [])) <= set(result.get("roles", [])), name
