"""Packed examples do not see each other: the same loss and the same gradients as apart."""

import pytest
import torch
from tiny import FAMILIES, perturb
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, OPTConfig, OPTForCausalLM

import veneer
from veneer.errors import DataError
from veneer.train.data import check_packing
from veneer.train.data.collate import Packed, Tokens
from veneer.train.data.packing import pack

LENGTHS = (5, 3, 7, 4, 6, 2)
METHODS = {
    "nothing": None,
    "LoRA": veneer.LoRA(rank=2),
    "PrefixTuning": veneer.PrefixTuning(length=3),
    "BottleneckAdapter": veneer.BottleneckAdapter(width=4),
}


@pytest.fixture
def examples():
    numbers = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 64, (length,), generator=numbers).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]], "length": len(ids)} for ids in rows]


def llama(attention):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, attn_implementation=attention, **sizes)
    return LlamaForCausalLM(config).double()


def test_rows_are_filled_and_nothing_is_lost(examples):
    rows = list(pack(examples, 10))
    assert [row["length"] for row in rows] == [10, 7, 10]
    assert sorted(token for row in rows for token in row["input_ids"]) == sorted(
        token for example in examples for token in example["input_ids"]
    )
    for row in rows:
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        assert [row["labels"][start] for start in starts] == [-100] * len(starts)
        assert len(row["labels"]) == len(row["input_ids"]) == len(row["position_ids"])


def test_the_first_token_of_an_example_is_not_taught_to_the_one_before():
    [row] = pack([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4], "labels": [3, 4]}], 4)
    assert row["labels"] == [-100, 2, -100, 4]


def trained(model, batches):
    """The sum of the losses of all tokens, and its gradients."""
    model.train()
    model.zero_grad()
    total = 0.0
    for batch in batches:
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="sum")
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_examples_apart(examples, method, attention):
    model = llama(attention)
    if METHODS[method]:
        perturb(veneer.attach(model, METHODS[method]))
    apart_loss, apart = trained(model, [Tokens(0)([example]) for example in examples])
    padded_loss, _ = trained(model, [Tokens(0)(examples)])
    packed_loss, packed = trained(model, [Packed(0)(list(pack(examples, 10)))])
    flat_loss, flat = trained(model, [Packed(0, flat=True)(list(pack(examples, 10)))])
    rel, atol = {"sdpa": (1e-12, 1e-13), "eager": (1e-8, 1e-6)}[attention]  # eager takes its softmax in float32
    for loss in (padded_loss, packed_loss, flat_loss):
        assert loss == pytest.approx(apart_loss, rel=rel)
    assert packed.keys() == apart.keys() != set()
    for name, gradient in apart.items():
        torch.testing.assert_close(packed[name], gradient, rtol=rel, atol=atol)
        torch.testing.assert_close(flat[name], gradient, rtol=rel, atol=atol)


def test_the_loss_without_borders_is_another(examples):
    """The test above could not tell packed from mixed if this were not so."""
    model = llama("sdpa")
    batch = Packed(0)(list(pack(examples, 10)))
    packed, _ = trained(model, [dict(batch)])
    batch["use_cache"] = True  # which turns the borders off in silence
    mixed, _ = trained(model, [dict(batch)])
    assert abs(mixed - packed) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gpt2"])
def test_models_that_keep_examples_apart_are_taken(family):
    model = FAMILIES[family].model()
    check_packing(model)
    perturb(veneer.attach(model, veneer.PrefixTuning(length=3)))
    check_packing(model)
    assert not model.training


def test_a_prompt_in_front_is_refused():
    model = llama("sdpa")
    veneer.attach(model, veneer.PromptTuning(length=3))
    with pytest.raises(DataError, match=r"see each other: .*A trained prompt in front of a row serves its first"):
        check_packing(model)


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))


def opt():
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    return OPTForCausalLM(OPTConfig(vocab_size=64, num_attention_heads=4, **sizes))


@pytest.mark.parametrize("build", [mamba, opt])
def test_a_model_with_a_state_and_one_that_makes_no_borders_are_refused(build):
    torch.manual_seed(0)
    model = build()
    with pytest.raises(DataError, match=rf"{type(model).__name__} .*data.packing: false"):
        check_packing(model)
