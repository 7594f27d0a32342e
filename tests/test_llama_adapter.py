"""Prompts attended apart: where they stand, how many parameters they have, and where they cannot be."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_prefix import build
from tiny import FAMILIES, HEADS, VOCABULARY, WIDTH, logits, perturb, text

import veneer
from veneer import errors


def test_parameters_of_llama_7b():
    config = transformers.LlamaConfig(vocab_size=8)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    adapter = veneer.attach(model, veneer.LLaMAAdapter())
    assert [claim.place.layer for claim in adapter.claims] == list(range(2, 32))
    assert sum(p.numel() for p in adapter.parameters()) == 30 * (10 * 4096 + 32)


def test_the_topmost_layers_are_chosen_and_saved(tmp_path):
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, veneer.LLaMAAdapter(length=3, layers=1))
    assert [claim.place.path for claim in adapter.claims] == ["model.layers.1.self_attn"]
    perturb(adapter)
    veneer.save(adapter, tmp_path)
    other = FAMILIES["llama"].model()
    assert [claim.place.path for claim in veneer.load(other, tmp_path).claims] == ["model.layers.1.self_attn"]
    assert torch.equal(logits(other, text()), logits(model, text()))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_it_is_the_formula(implementation):
    model = FAMILIES["gpt2"].model()
    model.set_attn_implementation(implementation)
    block = model.transformer.h[1].attn
    seen = {}
    block.c_attn.register_forward_hook(lambda module, args, output: seen.update(q=output[..., :WIDTH]))
    block.c_proj.register_forward_pre_hook(lambda module, args: seen.update(mixed=args[0]))
    adapter = veneer.attach(model, veneer.LLaMAAdapter(length=3, layers=1))
    logits(model, text())
    own = seen["mixed"]
    perturb(adapter)
    logits(model, text())
    delta = adapter.claims[0].delta
    split = lambda x: x.unflatten(-1, (HEADS, -1)).transpose(-2, -3)  # noqa: E731
    prompt = delta.prompt @ block.c_attn.weight + block.c_attn.bias
    key, value = split(prompt[:, WIDTH : 2 * WIDTH]), split(prompt[:, 2 * WIDTH :])
    scores = split(seen["q"]) @ key.mT / (WIDTH // HEADS) ** 0.5
    more = torch.tanh(delta.gate) * (scores.softmax(-1) @ value)
    torch.testing.assert_close(seen["mixed"], own + more.transpose(1, 2).flatten(2))


def test_a_prefix_and_prompts_apart_go_together():
    model = FAMILIES["llama"].model()
    methods = (veneer.PrefixTuning(length=2), veneer.LLaMAAdapter(length=3))
    adapter = veneer.attach(model, methods)
    perturb(adapter)
    logits(model, text()).pow(2).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_what_has_no_projections_of_its_own_is_refused():
    with pytest.raises(errors.MethodError, match="attention's k is not one projection"):
        veneer.attach(build("mla"), veneer.LLaMAAdapter())
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=HEADS)
    with pytest.raises(errors.MethodError, match="attends in code of its own"):
        veneer.attach(transformers.BloomForCausalLM(config), veneer.LLaMAAdapter())
