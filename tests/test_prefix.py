"""Prefix tuning on every kind of attention, mask and cache, row by row, and where a prefix starts."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import FAMILIES, HEADS, IDS, SIZES, TOKENS, VOCABULARY, logits, perturb, text
from torch import nn

import veneer
from veneer import errors

LENGTH = 3
PREFIX = veneer.PrefixTuning(length=LENGTH, std=0.5)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ROUTES = ["one", ("one", "two"), None]
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
KINDS = {
    "mqa": ("Llama", {"num_key_value_heads": 1}),
    "head_dim": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 12}),
    "window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
    "two rotations": ("Gemma3", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4,
                                 "layer_types": ["sliding_attention", "full_attention"]}),
    "mla": ("DeepseekV3", {"num_key_value_heads": HEADS, **MLA, **EXPERTS}),
    "part rotated": ("GPTNeoX", {"rotary_pct": 0.5}),
}  # fmt: skip


def build(kind: str, **options) -> nn.Module:
    name, sizes = KINDS[kind]
    suffix = "TextConfig" if name == "Gemma3" else "Config"
    config = getattr(transformers, name + suffix)(vocab_size=VOCABULARY, **{**SIZES, **TOKENS, **sizes})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")._from_config(config, **options).double().eval()


def attached(model: nn.Module, *names: str, method: veneer.Method = PREFIX, where: str | None = None) -> nn.Module:
    for name in names or ("default",):
        perturb(veneer.attach(model, method, where, name=name), scale=0.2 if name == "one" else 0.7)
    return model


@torch.no_grad()
def answer(model: nn.Module, batch: dict) -> torch.Tensor:
    return logits(model, batch)


def generated(model: nn.Module, batch: dict, **options) -> torch.Tensor:
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    return model.generate(**batch, **fixed, **options)


def padded(side: str) -> dict:
    """Rows of six, four and five tokens."""
    mask = torch.ones_like(IDS)
    for row, pads in enumerate((0, 2, 1)):
        mask[row, slice(0, pads) if side == "left" else slice(6 - pads, 6)] = 0
    return {"input_ids": IDS * mask, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention_has_its_shapes_its_gradients_and_its_caches(kind):
    model = build(kind)
    base = answer(model, text())
    adapter = veneer.attach(model, PREFIX)
    assert not torch.allclose(answer(model, text()), base, atol=1e-4)
    logits(model, text()).pow(2).mean().backward()
    assert len(list(adapter.parameters())) == 4
    assert all(p.grad.flatten(2).abs().amax(-1).gt(0).all() for p in adapter.parameters())
    plain = generated(model, text())
    assert torch.equal(generated(model, text(), use_cache=False), plain)
    assert torch.equal(generated(model, text(), cache_implementation="static"), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_no_later_token_moves_an_earlier_output_and_slots_permute(kind):
    model = attached(build(kind))
    before = answer(model, text())
    other = IDS.clone()
    other[:, -1] = 13
    torch.testing.assert_close(answer(model, text(other))[:, :-1], before[:, :-1])
    with torch.no_grad():
        for parameter in veneer.adapters(model)["default"].parameters():
            parameter.copy_(parameter.flip(1))
    torch.testing.assert_close(answer(model, text()), before)


# transformers compiles the masks of flex_attention by a flag that torch has deprecated, and torch warns of itself
flexible = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@flexible
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_rows_with_a_prefix_another_or_none_equal_the_row_alone(side, implementation):
    dtype = torch.float64 if implementation == "sdpa" else torch.float32
    model = attached(FAMILIES["llama"].model(), "one", "two").to(dtype)
    model.set_attn_implementation(implementation)
    batch = padded(side) if side != "none" else text()
    with veneer.use(model, rows=ROUTES):
        mixed = answer(model, batch)
    for row, names in enumerate((("one",), ("one", "two"), ())):
        shown = batch["attention_mask"][row].bool()
        alone = {"input_ids": batch["input_ids"][row, shown][None]}
        model.set_attn_implementation("sdpa")
        with veneer.use(model, *names):
            torch.testing.assert_close(mixed[row, shown], answer(model, alone)[0], **CLOSE)


@pytest.mark.parametrize("kind", ["window", "mla"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_rows_generate_as_they_do_alone(kind, cache):
    model = attached(build(kind), "one", "two")
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    batch = {key: value for key, value in padded("left").items() if key != "position_ids"}
    with veneer.use(model, rows=ROUTES):
        mixed = generated(model, batch, **options)[:, 6:]
    for row, names in enumerate((("one",), ("one", "two"), ())):
        ids = IDS[row, batch["attention_mask"][row].bool()][None]
        with veneer.use(model, *names):
            assert torch.equal(mixed[row], generated(model, text(ids))[0, ids.shape[1] :])


def test_beams_of_a_row_keep_its_prefix():
    model = attached(build("mqa"), "one", "two")
    with veneer.use(model, rows=ROUTES):
        mixed = generated(model, text(), num_beams=3)
    for row, names in enumerate((("one",), ("one", "two"), ())):
        with veneer.use(model, *names):
            assert torch.equal(mixed[row], generated(model, text(IDS[row : row + 1]), num_beams=3)[0])


def test_rows_differ_in_a_decoder_that_attends_to_an_encoder():
    family = FAMILIES["t5"]
    model = attached(family.model(), "one", "two", where="attention | cross_attention")
    assert len(veneer.adapters(model)["one"].claims) == 6
    batch = family.batch()
    with veneer.use(model, rows=ROUTES):
        mixed = answer(model, batch)
    for row, names in enumerate((("one",), ("one", "two"), ())):
        with veneer.use(model, *names):
            torch.testing.assert_close(mixed[row], answer(model, batch)[row])


def test_cross_attention_alone_can_have_a_prefix():
    model = FAMILIES["t5"].model()
    paths = [claim.place.path for claim in veneer.attach(model, PREFIX, "cross_attention").claims]
    assert paths == [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(2)]


def test_two_prefixes_are_one_long_prefix():
    model = attached(FAMILIES["llama"].model(), "one", "two")
    veneer.activate(model, "one", "two")
    both = answer(model, text())
    parts = [dict(veneer.adapters(model)[name].state_dict()) for name in ("two", "one")]
    long = FAMILIES["llama"].model()
    adapter = veneer.attach(long, veneer.PrefixTuning(length=2 * LENGTH))
    adapter.load_state_dict({key: torch.cat([part[key] for part in parts], dim=1) for key in parts[0]})
    torch.testing.assert_close(answer(long, text()), both)


def test_a_prefix_goes_with_lora():
    model = FAMILIES["llama"].model()
    perturb(veneer.attach(model, {"attention": PREFIX, "linear": veneer.LoRA(rank=2)}))
    both = answer(model, text())
    merged = FAMILIES["llama"].model()
    lora = veneer.attach(merged, veneer.LoRA(rank=2), name="lora")
    prefix = veneer.attach(merged, PREFIX, name="prefix")
    state = veneer.adapters(model)["default"].state_dict()
    for adapter in (lora, prefix):
        adapter.load_state_dict({key: state[key] for key in adapter.state_dict()})
    veneer.merge(merged, lora)
    torch.testing.assert_close(answer(merged, text()), both)


def test_gradient_checkpointing_of_the_model_itself_changes_no_gradient():
    model = FAMILIES["llama"].model()
    adapter = attached(model, method=veneer.PrefixTuning(length=LENGTH, reparameterization=True, hidden=5))
    gradients = []
    for recompute in (False, True):
        model.train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        logits(model, text()).pow(2).mean().backward()
        gradients.append([p.grad.clone() for p in veneer.adapters(adapter)["default"].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@flexible
def test_flex_attention_equals_sdpa():
    model = attached(FAMILIES["llama"].model()).float()
    for batch in (text(), padded("left")):
        expected = answer(model, batch)
        model.set_attn_implementation("flex_attention")
        shown = batch["attention_mask"].bool()
        torch.testing.assert_close(answer(model, batch)[shown], expected[shown], **CLOSE)
        model.set_attn_implementation("sdpa")


def test_parameters_of_gpt2_medium():
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    base = veneer.count_parameters(model).total
    veneer.attach(model, veneer.PrefixTuning(length=10))
    counted = veneer.count_parameters(model)
    assert counted.trainable == 491_520
    assert round(100 * counted.trainable / base, 2) == 0.14


def test_parameters_of_the_network_and_of_what_is_saved():
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, veneer.PrefixTuning(length=5, reparameterization=True, hidden=7))
    rows = 2 * 2 * (8 + 8)  # layers · kv heads · (key and value width)
    assert sum(p.numel() for p in adapter.parameters()) == 5 * 32 + (32 + 1) * 7 + (7 + 1) * rows
    assert sum(p.numel() for p in adapter.folded().parameters()) == 5 * rows


def test_a_saved_network_is_a_plain_prefix(tmp_path):
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, veneer.PrefixTuning(length=5, reparameterization=True, hidden=7))
    state = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    veneer.save(adapter, tmp_path)
    assert all(torch.equal(state[key], tensor) for key, tensor in adapter.state_dict().items())
    loaded = veneer.load(FAMILIES["llama"].model(), tmp_path)
    assert {str(claim.method) for claim in loaded.claims} == {str(veneer.PrefixTuning(length=5))}


@pytest.mark.parametrize("options", [{"hidden": 9}, {"reparameterization": True, "std": 0.5}])
def test_an_option_that_changes_nothing_is_refused(options):
    with pytest.raises(errors.MethodError, match="changes nothing with reparameterization"):
        veneer.attach(FAMILIES["llama"].model(), veneer.PrefixTuning(**options))


FRONT = torch.tensor([[11, 4, 50]])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("window", "two rotations")])
def test_a_prefix_started_from_tokens_is_those_tokens_in_front(kind):
    model = build(kind)
    expected = answer(model, text(torch.cat([FRONT.expand(3, -1), IDS], dim=1)))[:, LENGTH:]
    adapter = veneer.attach(model, PREFIX)
    veneer.start_prefix(model, adapter, {"input_ids": torch.cat([FRONT, IDS[:1]], dim=1)})
    torch.testing.assert_close(answer(model, text()), expected, **CLOSE)


def test_where_positions_are_learned_the_tokens_stand_at_the_first_ones():
    model = FAMILIES["gpt2"].model()
    positions = torch.cat([torch.arange(LENGTH), torch.arange(IDS.shape[1])])[None]
    ids = torch.cat([FRONT.expand(3, -1), IDS], dim=1)
    mask = torch.ones_like(ids)  # without one, positions that start again mean packed sequences
    expected = answer(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})[:, LENGTH:]
    veneer.start_prefix(model, veneer.attach(model, PREFIX), text(FRONT))
    torch.testing.assert_close(answer(model, text()), expected, **CLOSE)


def test_with_an_offset_learned_positions_go_on_behind_the_prefix():
    model = FAMILIES["gpt2"].model()
    expected = answer(model, text(torch.cat([FRONT.expand(3, -1), IDS], dim=1)))[:, LENGTH:]
    before = answer(model, text())
    adapter = veneer.attach(model, veneer.PrefixTuning(length=LENGTH, position_offset=LENGTH), name="a")
    veneer.start_prefix(model, adapter, text(FRONT))
    torch.testing.assert_close(answer(model, text()), expected, **CLOSE)
    with veneer.use(model):
        assert torch.equal(answer(model, text()), before)
    with veneer.use(model, rows=["a", None, "a"]), pytest.raises(errors.RoutingError, match="moves the positions"):
        answer(model, text())
    table = veneer.attach(model, veneer.FullFineTuning(), where="wpe", name="table")
    veneer.activate(model, "a", "table")
    with pytest.raises(errors.RoutingError, match="changes the table of positions"):
        answer(model, text())
    veneer.detach(model, table)
    veneer.detach(model, adapter)
    assert torch.equal(answer(model, text()), before)


@pytest.mark.parametrize(("family", "where"), [("llama", None), ("t5", None), ("gpt2", "h.1.*")])
def test_an_offset_without_a_table_to_move_along_is_refused(family, where):
    with pytest.raises(errors.MethodError, match="position_offset=3 moves tokens along a table"):
        veneer.attach(FAMILIES[family].model(), veneer.PrefixTuning(length=3, position_offset=3), where)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_is_the_mean_over_rows_and_drops_nothing(family):
    model = FAMILIES[family].model().train()
    modes = {name: module.training for name, module in model.named_modules()}
    method = veneer.PrefixTuning(length=LENGTH)
    adapter = veneer.attach(model, method)
    batch = FAMILIES[family].batch()
    states = []
    for rows in (slice(0, 3), slice(0, 1), slice(1, 2), slice(2, 3)):
        veneer.start_prefix(model, adapter, {key: value[rows] for key, value in batch.items()})
        states.append({key: value.clone() for key, value in adapter.state_dict().items()})
    for key in states[0]:
        torch.testing.assert_close(states[0][key], torch.stack([state[key] for state in states[1:]]).mean(0), **CLOSE)
    assert modes == {name: module.training for name, module in model.named_modules() if name in modes}


@pytest.mark.parametrize(
    ("method", "batch", "words"),
    [
        (PREFIX, text(FRONT[:, :2]), "saw 2 positions of the batch, and its prefix has 3"),
        (PREFIX, padded("left"), "hold padding"),
        (veneer.LoRA(), text(), "has no prefix to start"),
        (veneer.PrefixTuning(reparameterization=True), text(), "makes its prefix by a network"),
    ],
)
def test_a_start_that_cannot_be_is_refused(method, batch, words):
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, method)
    before = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    with pytest.raises(errors.MethodError, match=words):
        veneer.start_prefix(model, adapter, batch)
    assert all(torch.equal(before[key], tensor) for key, tensor in adapter.state_dict().items())


def flash(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs):
    """What flash attention computes: causal from the bottom right, a mask of tokens, a window in keys."""
    queries, keys = query.shape[2], key.shape[2]
    assert attention_mask is None or attention_mask.shape == (len(key), keys)
    shown = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if sliding_window is not None:
        shown = shown & ~torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries - sliding_window)
    if attention_mask is not None:
        shown = shown & attention_mask.bool()[:, None, None]
    shown = shown | ~shown.any(-1, keepdim=True)  # what padding sees, nobody reads
    out = nn.functional.scaled_dot_product_attention(query, key, value, shown, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


@pytest.fixture
def fake_flash():
    name = "flash_attention_fake"
    masks = transformers.AttentionMaskInterface
    transformers.AttentionInterface.register(name, flash)
    masks.register(name, masks._global_mapping["flash_attention_2"])
    yield name
    del transformers.AttentionInterface._global_mapping[name], masks._global_mapping[name]


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("rows", [None, ROUTES])
def test_flash_attention_masks(fake_flash, side, rows):
    model = attached(FAMILIES["llama"].model(), "one", "two")
    batch = padded(side) if side != "none" else text()
    shown = batch["attention_mask"].bool()
    named = () if rows else ("one",)
    with veneer.use(model, *named, rows=rows):
        expected = answer(model, batch)
        model.config._attn_implementation = fake_flash
        torch.testing.assert_close(answer(model, batch)[shown], expected[shown])


def test_flash_attention_refuses_what_keys_in_front_would_shift(fake_flash):
    model = attached(build("window"))
    model.config._attn_implementation = fake_flash
    with pytest.raises(errors.VeneerError, match="slide out of its window of 4"):
        answer(model, text())
    model = attached(build("mqa"))
    model.config._attn_implementation = fake_flash
    packed = {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    with pytest.raises(errors.VeneerError, match="packed sequences"):
        answer(model, packed)


def test_packed_sequences_see_the_prefix_each():
    model = attached(FAMILIES["llama"].model())
    packed = {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": False}
    apart = answer(model, {"input_ids": IDS[0].view(2, 3)})
    torch.testing.assert_close(answer(model, packed)[0], apart.flatten(0, 1))


def test_a_paged_cache_is_refused():
    model = attached(FAMILIES["llama"].model())
    with pytest.raises(errors.VeneerError, match="paged cache"):
        model(**text(), cache=object())


def test_an_attention_that_masks_for_itself_cannot_tell_rows_apart():
    name = "mine"
    transformers.AttentionInterface.register(name, flash)
    model = attached(FAMILIES["llama"].model())
    model.config._attn_implementation = name
    with veneer.use(model, rows=["default", None, None]), pytest.raises(errors.RoutingError, match="'mine'"):
        answer(model, {"input_ids": IDS})
    del transformers.AttentionInterface._global_mapping[name]
