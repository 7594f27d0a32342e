"""Prompt tuning and P-tuning: what stands in front, what is cut off again, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, IDS, SIZES, TOKENS, VOCABULARY, WIDTH, perturb, text
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import veneer
from veneer.errors import MethodError, NoSuchPlace, RoutingError, VeneerError

LENGTH = 3


def seeded(build, config) -> nn.Module:
    torch.manual_seed(0)
    return build(config).double().eval()


def prompted(model: nn.Module, length: int = LENGTH, name: str = "default") -> veneer.Adapter:
    adapter = veneer.attach(model, veneer.PromptTuning(length), name=name)
    perturb(adapter, 1.0)
    return adapter


def embeddings(adapter: veneer.Adapter) -> Tensor:
    return adapter.claims[0].delta.embeddings.detach()


def padded(batch: dict[str, Tensor], left: int, right: int = 0, value: int = 0) -> dict[str, Tensor]:
    pad = nn.functional.pad
    ids, mask = pad(batch["input_ids"], (left, right), value=value), pad(batch["attention_mask"], (left, right))
    return {**batch, "input_ids": ids, "attention_mask": mask}


def test_a_classifier_reads_the_first_token_and_not_the_first_slot():
    model = seeded(BertForSequenceClassification, BertConfig(vocab_size=VOCABULARY, num_labels=3, **SIZES))
    words = model.bert.embeddings.word_embeddings
    front = embeddings(prompted(model)).expand(len(IDS), -1, -1)
    answer = model(**text()).logits
    with veneer.use(model):
        whole = torch.cat([front, words(IDS)], dim=1)
        states = model.bert(inputs_embeds=whole).last_hidden_state
        expected = model.classifier(model.bert.pooler(states[:, LENGTH:]))
    torch.testing.assert_close(answer, expected, rtol=1e-12, atol=1e-12)


def test_hidden_states_and_losses_are_those_of_the_tokens():
    model = FAMILIES["llama"].model()
    prompted(model)
    output = model(**text(), labels=IDS, output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, 6, WIDTH)] * 3
    loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-6, atol=0)
    as_tuple = model(**text(), return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)


def test_embeddings_may_be_given_instead_of_ids():
    model = FAMILIES["llama"].model()
    prompted(model)
    given = {"inputs_embeds": model.model.embed_tokens(IDS), "attention_mask": text()["attention_mask"]}
    assert torch.equal(model(**given).logits, model(**text()).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_counts_the_slots_once(family):
    model = FAMILIES[family].model()
    prompted(model)
    batch = text()
    start = 0 if model.config.is_encoder_decoder else IDS.shape[1]

    def generated(given: dict[str, Tensor], **options) -> Tensor:
        fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        with torch.no_grad():
            return model.generate(**given, **fixed, **options)[:, -6:]

    plain = generated(batch)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generated(padded(batch, 2), **options), plain), options
    beams = generated(batch, num_beams=3)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generated(padded(batch, 2), num_beams=3, **options), beams), options
    if start:
        assert torch.equal(generated(batch, prefill_chunk_size=4), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_rows_with_prompts_of_different_lengths_generate_as_alone(family, options):
    model = FAMILIES[family].model()
    prompted(model, 3, "short")
    prompted(model, 5, "long")
    batch = text(IDS.clone())
    batch["input_ids"][1, :2], batch["attention_mask"][1, :2] = 0, 0
    rows = ["short", ("short", "long"), None]
    fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    with veneer.use(model, rows=rows):
        together = model.generate(**batch, **fixed)[:, -5:]
    for i, row in enumerate(rows):
        alone = {key: tensor[i : i + 1, 2 if i == 1 else 0 :] for key, tensor in batch.items()}
        with veneer.use(model, rows=[row]):
            assert torch.equal(model.generate(**alone, **fixed)[0, -5:], together[i])


def test_positions_that_a_model_counts_from_its_padding_id():
    model = seeded(RobertaForMaskedLM, RobertaConfig(vocab_size=VOCABULARY, pad_token_id=1, **SIZES))
    prompted(model)
    batch = text(IDS + 2)
    answer = model(**batch).logits
    for left, right in ((2, 0), (0, 2)):
        outer = model(**padded(batch, left, right, value=1)).logits[:, left : left + IDS.shape[1]]
        torch.testing.assert_close(outer, answer, rtol=1e-12, atol=1e-12)


def bart() -> nn.Module:
    sides = {f"{s}_{w}": n for s in ("encoder", "decoder") for w, n in (("layers", 1), ("attention_heads", 4))}
    return seeded(
        BartForConditionalGeneration,
        BartConfig(vocab_size=VOCABULARY, d_model=WIDTH, max_position_embeddings=64, **sides, **TOKENS),
    )


def test_rows_where_a_model_counts_all_positions_itself():
    model = bart()
    prompted(model)
    with veneer.use(model, rows=["default", None, None]), pytest.raises(RoutingError, match="Run the rows apart"):
        model(**text(), decoder_input_ids=IDS)


def test_t5_has_its_prompt_before_the_encoder_unless_told():
    model = FAMILIES["t5"].model()
    adapter = prompted(model)
    assert [claim.place.path for claim in adapter.claims] == ["encoder.embed_tokens"]
    both = veneer.attach(model, veneer.PromptTuning(2), where="embedding", name="both")
    assert len(both.claims) == 2
    output = model(**text(), decoder_input_ids=IDS[:, :4])
    assert output.logits.shape[1] == 4
    assert output.encoder_last_hidden_state.shape[1] == IDS.shape[1] + 2, "the decoder attends to what stands in front"


def test_token_ids_are_repeated_or_cut():
    model = FAMILIES["llama"].model()
    table = model.model.embed_tokens.weight
    for length, ids in ((5, [7, 9, 7, 9, 7]), (1, [7])):
        adapter = veneer.attach(model, veneer.PromptTuning(length, init=(7, 9)))
        assert torch.equal(embeddings(adapter), table[ids])
        veneer.detach(model, adapter)
    with pytest.raises(MethodError, match="no list of token ids below 64"):
        veneer.attach(model, veneer.PromptTuning(init=[64]))
    with pytest.raises(MethodError, match="no list of token ids"):
        veneer.attach(model, veneer.PromptTuning(init=[]))
    with pytest.raises(MethodError, match="init"):
        veneer.PromptTuning(init="vocab")


def test_starts_from_what_the_table_returns():
    sizes = {"head_dim": 8, "num_key_value_heads": 2, **SIZES}
    model = seeded(Gemma3ForCausalLM, Gemma3TextConfig(vocab_size=VOCABULARY, **sizes, **TOKENS))
    start = embeddings(veneer.attach(model, veneer.PromptTuning(2, init=(5, 6)), name="ids"))
    torch.testing.assert_close(start, model.model.embed_tokens.weight[[5, 6]] * WIDTH**0.5, rtol=1e-2, atol=0)
    random = embeddings(veneer.attach(model, veneer.PromptTuning(50, init="random"), name="random"))
    assert random.abs().max() <= 0.5
    assert random.std() > 0.25
    chosen = embeddings(veneer.attach(model, veneer.PromptTuning(50), name="vocabulary"))
    scaled = model.model.embed_tokens(torch.arange(VOCABULARY)).detach()
    assert torch.cdist(chosen, scaled).min(1).values.max() < 1e-6


def test_the_papers_parameter_count():
    """Lester et al.: 5 tokens on T5 XXL are 20,480 parameters."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 1}
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**sizes))
    adapter = veneer.attach(model, veneer.PromptTuning(5))
    assert sum(p.numel() for p in adapter.parameters()) == 20_480


def test_p_tuning_is_saved_as_the_prompt_it_made(tmp_path):
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, veneer.PTuning(LENGTH, hidden=5, layers=3))
    mlp = WIDTH * 5 + 5 + 2 * (5 * 5 + 5) + 5 * WIDTH + WIDTH
    assert sum(p.numel() for p in adapter.parameters()) == LENGTH * WIDTH + mlp
    veneer.save(adapter, tmp_path)
    loaded = veneer.load(FAMILIES["llama"].model(), tmp_path)
    assert loaded.claims[0].method == veneer.PromptTuning(LENGTH)
    assert sum(p.numel() for p in loaded.parameters()) == LENGTH * WIDTH


def test_masks_over_queries_and_keys_are_refused():
    model = FAMILIES["llama"].model()
    prompted(model)
    mask = torch.ones(3, 1, 6, 6, dtype=torch.bool).tril()
    with pytest.raises(VeneerError, match=r"Pass attention_mask as \[batch, length\]"):
        model(input_ids=IDS, attention_mask=mask)


def test_a_cache_without_the_slots_is_refused():
    model = FAMILIES["llama"].model()
    prompted(model)
    with veneer.use(model):
        cache = model(**text(), use_cache=True).past_key_values
    with pytest.raises(VeneerError, match="The cache holds 6 positions"):
        model(IDS[:, :1], attention_mask=torch.ones(3, 7, dtype=torch.long), past_key_values=cache)


def test_a_static_cache_in_which_all_layers_slide():
    sizes = {"num_key_value_heads": 2, "sliding_window": 5, **SIZES}
    model = seeded(MistralForCausalLM, MistralConfig(vocab_size=VOCABULARY, **sizes, **TOKENS))
    prompted(model)
    with pytest.raises(VeneerError, match="Use the dynamic cache"):
        model.generate(**padded(text(), 2), max_new_tokens=4, cache_implementation="static")


def test_a_static_cache_gets_room():
    model = FAMILIES["llama"].model()
    prompted(model)
    cache = StaticCache(config=model.config, max_cache_len=IDS.shape[1])
    answer = model(**text(), past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(answer, model(**text()).logits, rtol=1e-10, atol=1e-10)


def test_what_has_no_token_embedding_is_no_place():
    with pytest.raises(NoSuchPlace, match="has no input"):
        veneer.attach(FAMILIES["vit"].model(), veneer.PromptTuning())


class Plain(nn.Module):
    """Nothing that transformers would know."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4)


def test_an_embedding_without_a_stack_above():
    with pytest.raises(VeneerError):
        veneer.attach(Plain(), veneer.PromptTuning(), where="words")
