"""Prefixes in front of attentions that models compute in code of their own, and those that are refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from tiny import FAMILIES, HEADS, IDS, SIZES, VOCABULARY, WIDTH, logits, perturb, text
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

import veneer
from veneer import errors, places

PREFIX = veneer.PrefixTuning(length=3, std=0.5)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ROUTES = ["one", ("one", "two"), None]
GPT = {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 64}
NEO = {"hidden_size": WIDTH, "num_layers": 2, "num_heads": HEADS, "attention_types": [[["global", "local"], 1]]}
DECODERS = {
    "Bloom": ("BloomForCausalLM", {"hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS}),
    "Falcon": ("FalconForCausalLM", {**SIZES, "new_decoder_architecture": False, "multi_query": True}),
    "GPTJ": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "GPTNeo": ("GPTNeoForCausalLM", {**NEO, "window_size": 4, "max_position_embeddings": 64}),
    "Mpt": ("MptForCausalLM", {"d_model": WIDTH, "n_layers": 2, "n_heads": HEADS, "max_seq_len": 64}),
}
ENCODERS = {
    "DebertaV2": ("DebertaV2ForMaskedLM", {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "RemBert": ("RemBertForMaskedLM", {**SIZES, "input_embedding_size": 16, "output_embedding_size": 16}),
    "RoFormer": ("RoFormerForMaskedLM", {**SIZES, "embedding_size": WIDTH}),
    "MegatronBert": ("MegatronBertForMaskedLM", SIZES),
}
KINDS = {**DECODERS, **ENCODERS}


def build(kind: str, **sizes) -> nn.Module:
    name, given = KINDS.get(kind, (f"{kind}LMHeadModel", sizes))
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, pad_token_id=0, **given)
    return getattr(transformers, name)(config).double().eval()


@torch.no_grad()
def answer(model: nn.Module, batch: dict | None = None) -> torch.Tensor:
    return logits(model, batch or text())


def generated(model: nn.Module, ids: torch.Tensor, **options) -> torch.Tensor:
    return model.generate(**text(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_slots_permute_count_and_let_nothing_through(kind):
    model = build(kind)
    base = answer(model)
    adapter = veneer.attach(model, PREFIX)
    assert len(adapter.claims) == 2
    before = answer(model)
    assert (before - base).abs().max() > 1e-4
    logits(model, text()).pow(2).mean().backward()
    assert all(p.grad.abs().amax((0, 2)).gt(0).all() for p in adapter.parameters())
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(parameter.flip(1))
    torch.testing.assert_close(answer(model), before, **CLOSE)
    if kind in DECODERS:
        other = IDS.clone()
        other[:, -1] = 13
        torch.testing.assert_close(answer(model, text(other))[:, :-1], before[:, :-1], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_detaching_restores_and_copies_work(kind):
    model = build(kind)
    base, keys = answer(model), list(model.state_dict())
    adapter = veneer.attach(model, PREFIX)
    adapted = answer(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(other), adapted)
        perturb(veneer.adapters(other)["default"])
        assert not torch.equal(answer(other), adapted)
        assert torch.equal(answer(model), adapted), "changing the copy changed the original"
    with veneer.use(model):
        torch.testing.assert_close(answer(model), base)
    veneer.detach(model, adapter)
    assert list(model.state_dict()) == keys
    assert torch.equal(answer(model), base)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_the_row_alone(kind):
    model = build(kind)
    for name in ("one", "two"):
        perturb(veneer.attach(model, PREFIX, name=name))
    with veneer.use(model, rows=ROUTES):
        mixed = answer(model)
    for row, names in enumerate((("one",), ("one", "two"), ())):
        with veneer.use(model, *names):
            torch.testing.assert_close(mixed[row], answer(model)[row], **CLOSE)


@pytest.mark.parametrize("kind", DECODERS)
def test_generation_with_a_cache_equals_without(kind):
    model = build(kind)
    perturb(veneer.attach(model, PREFIX))
    assert torch.equal(generated(model, IDS), generated(model, IDS, use_cache=False))


@pytest.mark.parametrize("kind", ["Bloom", "GPTJ", "RoFormer"])
def test_a_prefix_goes_with_lora_and_checkpointing(kind):
    model = build(kind).train()
    adapter = veneer.attach(model, {"attention": PREFIX, "linear": veneer.LoRA(rank=2)})
    perturb(adapter)
    found = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        logits(model, text()).pow(2).mean().backward()
        found.append([p.grad.clone() for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_code_that_does_something_else_with_the_scores_is_refused():
    model = build("OpenAIGPT", **GPT)
    keys = list(model.state_dict())
    with pytest.raises(errors.UnreadableModel, match=r"OpenAIGPT.* attends in code of its own.* no keys can stand: "):
        veneer.attach(model, PREFIX)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())


def test_a_start_from_tokens_is_refused_where_keys_do_not_show():
    model = build("Bloom")
    adapter = veneer.attach(model, PREFIX)
    with pytest.raises(errors.MethodError, match="attends in code of its own"):
        veneer.start_prefix(model, adapter, text())


class Direct:
    """A registry that no one else looks into, as modules have that name one implementation themselves."""

    def get_interface(self, implementation, default):
        return sdpa_attention_forward


@pytest.mark.parametrize("masked", [False, True])
def test_an_implementation_named_directly_is_no_way_round(monkeypatch, masked):
    expected, model = (FAMILIES["llama"].model() for _ in range(2))
    batch = text() if masked else {"input_ids": IDS}
    if masked:
        batch["attention_mask"] = batch["attention_mask"].clone()
        batch["attention_mask"][0, :2] = 0
    perturb(veneer.attach(expected, PREFIX))
    state = veneer.adapters(expected)["default"].state_dict()
    wanted = answer(expected, batch)
    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Direct())
    adapter = veneer.attach(model, PREFIX)  # the code repeats the heads that queries share before it attends
    repeats = {key: len(tensor) // len(state[key]) for key, tensor in adapter.state_dict().items()}
    adapter.load_state_dict({key: tensor.repeat_interleave(repeats[key], 0) for key, tensor in state.items()})
    torch.testing.assert_close(answer(model, batch), wanted)
    assert torch.equal(generated(model, IDS), generated(model, IDS, use_cache=False))


def test_trying_it_leaves_the_model_as_it_is():
    model = build("Bloom").train()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = torch.get_rng_state()
    assert len(places.find(model, "attention", "attention")) == 2
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_an_error_inside_leaves_no_mode_behind():
    model = build("GPTJ")
    veneer.attach(model, PREFIX)
    last = model.transformer.h[1].attn.out_proj.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer(model)
    last.remove()
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.isfinite(answer(model)).all()
