"""LLaMAAdapter computes what Hugging Face PEFT's AdaptionPrompt computes, whose one gate a layer is without tanh."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny import FAMILIES, HEADS, SIZES, TOKENS, VOCABULARY, logits, text
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

import veneer

with warnings.catch_warnings():
    # peft imports every quantizer it finds, and some of those warn at import that they lack a kernel or a compiler
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def mistral() -> nn.Module:
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(vocab_size=VOCABULARY, num_key_value_heads=HEADS, **SIZES, **TOKENS)
    ).double()


@pytest.mark.parametrize("build", [FAMILIES["llama"].model, mistral], ids=["llama", "mistral"])
@pytest.mark.parametrize("layers", [1, 2])
def test_equal_weights_give_equal_outputs_and_gradients(build, layers):
    model = build().eval()
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=layers, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    ours = copy.deepcopy(model)
    adapter = veneer.attach(ours, veneer.LLaMAAdapter(length=3, layers=layers))
    state = dict(theirs.named_parameters())
    pairs = []
    with torch.no_grad():
        for i, claim in enumerate(adapter.claims):
            stem = f"base_model.model.{claim.place.path}.adaption"
            prompt, gate = state[f"{stem}_prompt"], state[f"{stem}_gate"]
            gate.fill_(0.3 + 0.2 * i)
            claim.delta.prompt.copy_(prompt[0])
            claim.delta.gate.copy_(torch.atanh(gate).expand_as(claim.delta.gate[:, 0, 0])[:, None, None])
            pairs.append((claim.delta, prompt, gate))
    assert len(pairs) == layers
    # peft computes its softmax in float32, whatever the model
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(logits(ours, text()), logits(theirs, text()), **close)
    logits(ours, text()).pow(2).mean().backward()
    logits(theirs, text()).pow(2).mean().backward()
    for delta, prompt, gate in pairs:
        torch.testing.assert_close(delta.prompt.grad, prompt.grad[0], **close)
        through_tanh = delta.gate.grad / (1 - torch.tanh(delta.gate) ** 2)
        torch.testing.assert_close(through_tanh.sum()[None], gate.grad, **close)
