"""A prefix computes what Hugging Face PEFT's computes, and either reads the other's files."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import transformers
from tiny import FAMILIES, SIZES, TOKENS, VOCABULARY, logits, perturb, text
from torch import Tensor, nn

import veneer
from veneer import errors
from veneer.interop.peft import prefix

with warnings.catch_warnings():
    # peft imports every quantizer it finds, and some of those warn at import that they lack a kernel or a compiler
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTH = 3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""The models compute the angles of their rotations in float32, whatever they are given."""
KINDS = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "mistral": ("Mistral", {"num_key_value_heads": 1}),
    "head_dim": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 12}),
    "part rotated": ("GPTNeoX", {"rotary_pct": 0.5}),
    "neighbours rotated": ("Cohere", {"num_key_value_heads": 2}),
    "scaled": ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                                             "original_max_position_embeddings": 512}}),
}  # fmt: skip
LEARNED = {
    "gpt2": ("GPT2", {}),
    "gpt_neo": ("GPTNeo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 64}),
    "opt": ("OPT", {"word_embed_proj_dim": SIZES["hidden_size"]}),
    "biogpt": ("BioGpt", {}),
}
"""Positions are a table; where a mask is given, OPT and BioGPT count them off it."""
KINDS |= LEARNED


def base(kind: str) -> nn.Module:
    name, sizes = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **{**SIZES, **TOKENS, **sizes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


def wrapped(model: nn.Module, **options) -> nn.Module:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, **options)
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(model), config).double().eval()


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return logits(model, text())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_give_the_same_logits_and_gradients(kind, tmp_path):
    model = base(kind)
    theirs = wrapped(model)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(model)
    adapter = veneer.load(ours, tmp_path)
    torch.testing.assert_close(answer(ours), answer(theirs), **CLOSE)
    logits(ours, text()).pow(2).mean().backward()
    logits(theirs, text()).pow(2).mean().backward()
    with torch.no_grad():
        for claim in adapter.claims:  # a gradient turns with its key
            for parameter in claim.delta.parameters():
                parameter.copy_(parameter.grad)
    (expected,) = (p.grad for p in theirs.parameters() if p.grad is not None)
    torch.testing.assert_close(prefix.to_tensors(adapter.claims)["prompt_embeddings"], expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_our_folder(kind, tmp_path):
    model = base(kind)
    ours = copy.deepcopy(model)
    adapter = veneer.attach(
        ours, veneer.PrefixTuning(length=LENGTH, std=0.5, position_offset=LENGTH * (kind in LEARNED))
    )
    perturb(adapter)
    veneer.save(adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).double().eval()
    torch.testing.assert_close(answer(theirs), answer(ours), **CLOSE)


def test_their_network_is_read_as_what_it_computes(tmp_path):
    model = base("llama")
    theirs = wrapped(model, prefix_projection=True, encoder_hidden_size=8)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(model)
    veneer.load(ours, tmp_path)
    torch.testing.assert_close(answer(ours), answer(theirs), **CLOSE)


def test_our_network_is_opened_by_peft_as_what_it_computes(tmp_path):
    model = base("llama")
    ours = copy.deepcopy(model)
    veneer.save(veneer.attach(ours, veneer.PrefixTuning(length=4, reparameterization=True, hidden=8)), tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).double().eval()
    torch.testing.assert_close(answer(theirs), answer(ours), **CLOSE)


def test_our_own_numbers_are_kept_bit_for_bit_beside_theirs(tmp_path):
    model = base("llama")
    adapter = veneer.attach(model, veneer.PrefixTuning(length=LENGTH))
    veneer.save(adapter, tmp_path)
    names = {"adapter_config.json", "adapter_model.safetensors", "veneer.json", "veneer.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == names
    loaded = veneer.load(base("llama"), tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in adapter.state_dict().items())
    (tmp_path / "veneer.json").unlink()
    other = veneer.load(base("llama"), tmp_path)
    for key, tensor in adapter.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], tensor, **CLOSE)


def test_other_adapters_on_the_model_do_not_disturb_the_turning(tmp_path):
    model = base("llama")
    theirs = wrapped(model)
    theirs.save_pretrained(tmp_path)
    perturb(veneer.attach(model, veneer.PrefixTuning(length=5, std=0.5), name="other"))
    veneer.load(model, tmp_path)
    torch.testing.assert_close(answer(model), answer(theirs), **CLOSE)


@pytest.mark.parametrize(("family", "where"), [("gpt2", None), ("bert", None), ("t5", None), ("llama", "layers.0.*")])
def test_what_peft_cannot_hold_is_saved_in_our_own_file(family, where, tmp_path):
    adapter = veneer.attach(FAMILIES[family].model(), veneer.PrefixTuning(length=LENGTH), where)
    veneer.save(adapter, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"veneer.json", "veneer.safetensors"}


@pytest.mark.parametrize("kind", LEARNED)
def test_padding_and_a_cache_find_the_learned_positions(kind, tmp_path):
    model = base(kind)
    theirs = wrapped(model)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(model)
    veneer.load(ours, tmp_path)
    batch = text() | {"attention_mask": torch.ones_like(text()["input_ids"])}
    batch["attention_mask"][0, :2] = 0
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**batch, **greedy), theirs.generate(**batch, **greedy))


def test_positions_of_neither_kind_are_refused_by_name(tmp_path):
    model = base("llama")
    wrapped(model).save_pretrained(tmp_path)
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=SIZES["hidden_size"], n_layer=2, n_head=4)
    bloom = transformers.BloomForCausalLM(config)
    with pytest.raises(errors.FileError, match=r"starts the text at position 3.*BloomForCausalLM does not rotate keys"):
        veneer.load(bloom, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_virtual_tokens": "3"}, "num_virtual_tokens is '3'"),
        ({"num_virtual_tokens": 4}, "prompt_embeddings is"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save beside a prefix"),
        ({"num_transformer_submodules": 2}, "decoder-only"),
    ],
)
def test_a_file_that_means_something_else_is_refused(change, words, tmp_path):
    model = base("llama")
    wrapped(model).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    keys = list(model.state_dict())
    with pytest.raises(errors.FileError, match=words):
        veneer.load(model, tmp_path)
    assert list(model.state_dict()) == keys


def test_a_file_for_another_model_is_refused(tmp_path):
    wrapped(base("qwen2")).save_pretrained(tmp_path)
    with pytest.raises(errors.WrongModel, match="prompt_embeddings"):
        veneer.load(base("mistral"), tmp_path)
