"""Bottleneck adapters against references written by hand, their counts, their options, and layers left to the base."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, IDS, SIZES, TOKENS, VOCABULARY, logits, perturb, text
from transformers import BertConfig, BertForMaskedLM, GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

import veneer
from veneer.site import Site

PLACEMENTS = ("serial", "parallel", "after_residual")
EVERYWHERE = "attention | mlp"


def bottleneck(adapter, path, z):
    """A(z) from the adapter's own tensors: relu, scale and biases written out."""
    own = {
        key.removeprefix(f"{path}.0.bottleneck."): tensor
        for key, tensor in adapter.state_dict().items()
        if key.startswith(f"{path}.0.")
    }
    h = F.relu(z @ own["down"].T + own["down_bias"])
    return own["scale"] * (h @ own["up"].T + own["up_bias"])


def attached(model, placement, **options):
    method = veneer.BottleneckAdapter(width=4, placement=placement, scaling="channel", **options)
    adapter = veneer.attach(model, method, EVERYWHERE)
    perturb(adapter)
    return adapter


def llama_by_hand(model, adapter, placement, ids):
    """Llama's forward with the adapter written into its blocks."""
    base = model.model
    hidden = base.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = base.rotary_emb(hidden, positions)
    causal = torch.full((ids.shape[1], ids.shape[1]), float("-inf"), dtype=hidden.dtype).triu(1)[None, None]
    for number, block in enumerate(base.layers):
        attention = lambda x, block=block: block.self_attn(x, position_embeddings=rotary, attention_mask=causal)[0]  # noqa: E731
        branches = [
            ("self_attn", block.input_layernorm, attention),
            ("mlp", block.post_attention_layernorm, block.mlp),
        ]
        for name, norm, branch in branches:
            x = norm(hidden)
            y = branch(x)
            z = {"serial": y, "parallel": x, "after_residual": hidden + y}[placement]
            hidden = hidden + y + bottleneck(adapter, f"model.layers.{number}.{name}", z)
    return model.lm_head(base.norm(hidden))


def bert_by_hand(model, adapter, placement, ids):
    """BERT's forward with the adapter written into its blocks; the norm stands on each sum."""
    hidden = model.bert.embeddings(input_ids=ids)
    for number, block in enumerate(model.bert.encoder.layer):
        path = f"bert.encoder.layer.{number}"
        branches = [
            ("attention.output", block.attention.output, block.attention.self),
            ("output", block.output, block.intermediate),
        ]
        for name, out, inner in branches:
            found = inner(hidden)
            y = out.dense(found[0] if isinstance(found, tuple) else found)
            z = {"serial": y, "parallel": hidden, "after_residual": out.LayerNorm(hidden + y)}[placement]
            hidden = out.LayerNorm(hidden + y + bottleneck(adapter, f"{path}.{name}.dense", z))
    return model.cls(hidden)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("family", "by_hand"), [("llama", llama_by_hand), ("bert", bert_by_hand)])
def test_equals_a_reference_written_by_hand(family, by_hand, placement):
    model = FAMILIES[family].model()
    plain = copy.deepcopy(model)
    batch = FAMILIES[family].batch()
    base = logits(model, batch)
    adapter = attached(model, placement)
    expected = by_hand(plain, adapter, placement, batch["input_ids"])
    actual = logits(model, batch)
    assert (actual - base).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def gptj():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    return GPTJForCausalLM(GPTJConfig(vocab_size=VOCABULARY, **sizes, **TOKENS))


def neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, use_parallel_residual=True, **SIZES, **TOKENS))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("build", [gptj, neox])
def test_blocks_whose_branches_are_parallel(build, placement):
    """x + attention(N(x)) + mlp(N(x)): both branches read the stream as it came in."""
    torch.manual_seed(0)
    model = build().double().eval()
    seen = {}
    blocks = model.transformer.h if build is gptj else model.gpt_neox.layers
    names = ("attn", "mlp") if build is gptj else ("attention", "mlp")
    adapter = attached(model, placement)
    (path,) = [path for path, module in model.named_modules() if module is blocks[1]]
    hooks = [blocks[1].register_forward_pre_hook(lambda _, args, kw: seen.update(x=args[0]), with_kwargs=True)]
    hooks += [blocks[1].register_forward_hook(lambda _, args, y: seen.update(y=y[0] if isinstance(y, tuple) else y))]
    logits(model, text())
    for hook in hooks:
        hook.remove()
    with veneer.use(model):
        norm = blocks[1].ln_1 if build is gptj else None
        inputs = {
            names[0]: norm(seen["x"]) if norm else blocks[1].input_layernorm(seen["x"]),
            names[1]: norm(seen["x"]) if norm else blocks[1].post_attention_layernorm(seen["x"]),
        }
        outputs = {}
        for name in names:
            getattr(blocks[1], name).register_forward_hook(
                lambda _, args, y, name=name: outputs.update({name: y[0] if isinstance(y, tuple) else y})
            )
        positions = torch.arange(6)[None].expand(3, -1)
        mask = torch.full((6, 6), float("-inf"), dtype=torch.float64).triu(1).expand(3, 1, 6, 6)
        extra = {"position_embeddings": model.gpt_neox.rotary_emb(seen["x"], positions)} if build is neox else {}
        blocks[1](seen["x"], attention_mask=mask, position_ids=positions, **extra)
    expected = seen["x"]
    for name in names:
        y = outputs[name]
        z = {"serial": y, "parallel": inputs[name], "after_residual": seen["x"] + y}[placement]
        expected = expected + y + bottleneck(adapter, f"{path}.{name}", z)
    torch.testing.assert_close(seen["y"], expected, rtol=0, atol=1e-12)


def test_houlsby_counts_on_bert_base():
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig())
    base = sum(p.numel() for p in model.bert.parameters())
    veneer.attach(model, veneer.BottleneckAdapter.houlsby(width=64), EVERYWHERE)
    assert veneer.count_parameters(model).trainable == 2_379_264
    assert round(100 * 2_379_264 / base, 1) == 2.2


def test_published_forms_count():
    """Width 768: Pfeiffer's 48 and He's 512 at 12 MLPs, AdapterPlus's 8 with a scale for each channel."""
    counts = {}
    for form in ("pfeiffer", "parallel", "adapter_plus"):
        with torch.device("meta"):
            model = BertForMaskedLM(BertConfig())
        veneer.attach(model, getattr(veneer.BottleneckAdapter, form)())
        counts[form] = veneer.count_parameters(model).trainable
    size = lambda width: 12 * (2 * width * 768 + width + 768)  # noqa: E731
    assert counts == {"pfeiffer": size(48), "parallel": size(512), "adapter_plus": size(8) + 12 * 768}
    assert counts["pfeiffer"] == 894_528


def test_a_chunked_mlp_passes_by_in_parts():
    model = FAMILIES["bert"].model()
    attached(model, "parallel")
    whole = logits(model, FAMILIES["bert"].batch())
    for block in model.bert.encoder.layer:
        block.chunk_size_feed_forward = 2
    torch.testing.assert_close(logits(model, FAMILIES["bert"].batch()), whole, rtol=1e-12, atol=1e-12)


def test_experts_have_one_adapter():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **sizes, **TOKENS)).eval()
    model.set_experts_implementation("batched_mm")
    base = logits(model, text())
    adapter = veneer.attach(model, veneer.BottleneckAdapter(width=4, placement="parallel"))
    assert torch.equal(logits(model, text()), base)
    perturb(adapter)
    assert (logits(model, text()) - base).abs().max() > 1e-3
    assert not veneer.check(model, text())


def test_a_resting_adapter_keeps_nothing_in_memory():
    model = FAMILIES["bert"].model()
    attached(model, "after_residual")
    one = attached(copy.deepcopy(FAMILIES["bert"].model()), "parallel")
    with veneer.use(model):
        logits(model, FAMILIES["bert"].batch())
    logits(one.model, FAMILIES["bert"].batch())
    held = [
        binding.held
        for each in (model, one.model)
        for module in each.modules()
        if isinstance(module, Site)
        for bindings in module.bindings.values()
        for binding in bindings
    ]
    assert len(held) == 8
    assert all(each.value is None for each in held)


def test_a_model_is_copied_in_the_middle_of_a_forward():
    model = FAMILIES["bert"].model()
    attached(model, "parallel")
    copies = []
    hook = model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda *_: copies.append(copy.deepcopy(model))
    )
    logits(model, FAMILIES["bert"].batch())
    hook.remove()
    torch.testing.assert_close(logits(copies[0], FAMILIES["bert"].batch()), logits(model, FAMILIES["bert"].batch()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0}, "width"),
        ({"reduction_factor": 0.0}, "reduction_factor"),
        ({"placement": "before"}, "placement"),
        ({"activation": "swish"}, "activation"),
        ({"scaling": "learnt"}, "scaling"),
        ({"scaling": float("inf")}, "scaling"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(veneer.errors.MethodError, match=rf"^BottleneckAdapter\({words}="):
        veneer.BottleneckAdapter(**options)


def test_a_width_and_a_factor_say_the_same_twice():
    with pytest.raises(veneer.errors.MethodError, match="Leave one of them out"):
        veneer.attach(FAMILIES["llama"].model(), veneer.BottleneckAdapter(width=4, reduction_factor=8))


@pytest.mark.parametrize(
    "method",
    [
        veneer.BottleneckAdapter(width=4, placement="after_residual", scaling="channel", norm=True),
        veneer.Compacter(width=8, placement="parallel"),
        veneer.AdapterFusion(parts=dict.fromkeys("ab", veneer.BottleneckAdapter(width=4))),
    ],
    ids=lambda method: type(method).__name__,
)
def test_weights_stay_float32_and_activations_bfloat16(method):
    model = FAMILIES["bert"].model().bfloat16()
    base = logits(model, text())
    adapter = veneer.attach(model, method)
    perturb(adapter)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = logits(model, text())
    assert out.dtype == torch.bfloat16
    assert (out - base).abs().max() > 1e-2
    wide = [t for t in kept if t.dtype == torch.float32 and t.shape[:2] == (3, 6)]
    assert all(t.shape[-1] < 4 for t in wide), "activations are kept in float32"


@pytest.mark.parametrize("method", [veneer.BottleneckAdapter(width=4), veneer.LoRA(rank=2)], ids=["bottleneck", "lora"])
def test_dropped_layers_are_the_base(method):
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, method)
    perturb(adapter)
    whole = logits(model, text())
    with veneer.use(model, adapter, drop_layers=[0]):
        dropped = logits(model, text())
    for key, parameter in adapter.named_parameters():
        if "layers.0." in key:
            parameter.data.zero_()
    with veneer.use(model, adapter):
        expected = logits(model, text())
    torch.testing.assert_close(dropped, expected, rtol=1e-12, atol=1e-12)
    assert (dropped - whole).abs().max() > 1e-3


def test_dropped_layers_do_not_train_until_they_act_again():
    model = FAMILIES["t5"].model()
    adapter = veneer.attach(model, veneer.BottleneckAdapter(width=4, placement="parallel"), "mlp | cross_attention")
    perturb(adapter)
    veneer.activate(model, adapter, drop_layers=range(1))
    logits(model, FAMILIES["t5"].batch()).sum().backward()
    with_gradient = {key for key, p in adapter.named_parameters() if p.grad is not None}
    assert with_gradient == {key for key, _ in adapter.named_parameters() if "block.1." in key}
    veneer.activate(model, adapter)
    assert all(p.requires_grad for p in adapter.parameters())


def test_dropping_is_noticed_by_compiled_code():
    model = FAMILIES["bert"].model()
    adapter = attached(model, "parallel")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for layers in ((), (0,), (1,), ()):
        with veneer.use(model, adapter, drop_layers=layers):
            torch.testing.assert_close(compiled(**text()).logits, logits(model, text()), rtol=1e-9, atol=1e-9)


def test_a_layer_that_is_not_there_is_named():
    model = FAMILIES["bert"].model()
    adapter = attached(model, "serial")
    with pytest.raises(veneer.errors.AdapterError, match=r"drop_layers names \[2, 3\].* They are in \[0, 1\]"):
        veneer.activate(model, adapter, drop_layers=range(4))


def test_a_merged_adapter_cannot_be_dropped_nor_a_dropped_one_merged():
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, veneer.LoRA(rank=2))
    veneer.activate(model, adapter, drop_layers=[1])
    with pytest.raises(veneer.errors.AdapterError, match=r"left out of model\.layers\.1\.self_attn\.q_proj"):
        veneer.merge(model, adapter)
    veneer.activate(model, adapter)
    veneer.merge(model, adapter)
    with pytest.raises(veneer.errors.AdapterError, match="merged into the weights"):
        veneer.activate(model, adapter, drop_layers=[0])


def test_what_is_left_to_the_base_is_said_and_is_no_fault():
    model = FAMILIES["llama"].model()
    adapter = attached(model, "parallel")
    veneer.activate(model, adapter, drop_layers=[1])
    assert "nothing acts at 2 of its places (drop_layers)" in adapter.summary()
    assert veneer.check(model, text()) == []


def test_compacter_is_a_bottleneck_with_kronecker_products():
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, veneer.Compacter(width=8, terms=4, rank=2, activation="tanh"))
    perturb(adapter)
    own = adapter.state_dict()
    part = {key.rpartition(".")[2]: value for key, value in own.items() if "layers.1." in key}
    kron = lambda side: sum(  # noqa: E731
        torch.kron(own["shared.0.A"][i], part[f"{side}_s"][i] @ part[f"{side}_t"][i]) for i in range(4)
    )
    y = torch.randn(3, 5, 32, dtype=torch.float64)
    expected = y + torch.tanh(y @ kron("down").T + part["down_bias"]) @ kron("up").T + part["up_bias"]
    torch.testing.assert_close(adapter.claims[1].delta(y, y), expected, rtol=1e-12, atol=1e-12)


def test_compacter_counts_on_t5_base():
    """Two adapters of width 24 in each of 24 blocks; the paper's 0.073% counts the 62 norms, which train too."""
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12))
    veneer.attach(model, veneer.Compacter(), "attention | mlp")
    one = 2 * (768 + 24) + 24 + 768
    count = veneer.count_parameters(model)
    assert count.trainable == 48 * one + 4**3 == 114_112
    assert round(100 * (count.trainable + 62 * 768) / (count.total - count.trainable), 3) == 0.073


def test_compacter_terms_divide_the_widths():
    with pytest.raises(veneer.errors.MethodError, match="terms=3 does not divide both 32 and the width 6"):
        veneer.attach(FAMILIES["llama"].model(), veneer.Compacter(width=6, terms=3))


def test_compacters_share_too_much_to_be_fused_but_stack():
    model = FAMILIES["llama"].model()
    for name in ("one", "two"):
        perturb(veneer.attach(model, veneer.Compacter(width=8), name=name))
    with pytest.raises(veneer.errors.MethodError, match="share no weights"):
        veneer.fuse(model, ["one", "two"])
    veneer.activate(model, "one", "two")
    expected = logits(model, text())
    stack = veneer.fuse(model, ["one", "two"], how="stack", name="stack")
    torch.testing.assert_close(logits(model, text()), expected, rtol=1e-12, atol=1e-12)
    assert len([key for key in stack.state_dict() if key.startswith("shared.")]) == 2


def test_where_the_norm_of_the_sum_is():
    """Post-norm blocks have one after each sum, also behind a reshape; others go on with the sum."""
    from transformers import FalconConfig, FalconForCausalLM, OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    opt = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    models = {
        "post": OPTForCausalLM(OPTConfig(**sizes, **opt, do_layer_norm_before=False)),
        "pre": OPTForCausalLM(OPTConfig(**sizes, **opt)),
        "parallel": FalconForCausalLM(FalconConfig(**sizes, parallel_attn=True)),
        "bert": FAMILIES["bert"].model(),
    }
    paths = {}
    for name, model in models.items():
        adapter = veneer.attach(model, veneer.BottleneckAdapter(width=4), EVERYWHERE)
        named = {module: path for path, module in model.named_modules()}
        paths[name] = [named.get(claim.place.norm, "").rpartition("layers.1.")[2] for claim in adapter.claims]
        assert [claim.place.layer for claim in adapter.claims] == [0, 0, 1, 1]
    assert paths["post"][2:] == ["self_attn_layer_norm", "final_layer_norm"]
    assert paths["pre"] == paths["parallel"] == [""] * 4
    assert paths["bert"][3] == "bert.encoder.layer.1.output.LayerNorm"


def test_an_invertible_adapter_is_undone_before_the_head():
    model = FAMILIES["gpt2"].model()
    adapter = veneer.attach(model, veneer.InvertibleAdapter())
    perturb(adapter)
    embedding, head = adapter.claims[0].delta, adapter.claims[1].delta
    e = torch.randn(3, 6, 32, dtype=torch.float64)
    changed = embedding(IDS, e)
    assert (changed - e).abs().max() > 1e-2
    torch.testing.assert_close(head(changed), e, rtol=1e-12, atol=1e-12)
    own = {key.removeprefix("shared.0."): tensor for key, tensor in adapter.state_dict().items()}
    net = lambda n, z: (  # noqa: E731
        F.relu(z @ own[f"{n}.down"].T + own[f"{n}.down_bias"]) @ own[f"{n}.up"].T + own[f"{n}.up_bias"]
    )
    a, b = e.chunk(2, -1)
    a = a + net("F", b)
    torch.testing.assert_close(changed, torch.cat([a, b + net("G", a)], -1), rtol=1e-12, atol=1e-12)


def test_an_invertible_adapter_counts_on_bert_base():
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig())
        model.tie_weights()
    veneer.attach(model, veneer.InvertibleAdapter())
    assert veneer.count_parameters(model).trainable == 2 * (2 * 384 * 192 + 192 + 384) == 296_064


def test_an_untied_head_is_not_undone():
    with pytest.raises(veneer.errors.MethodError, match="lm_head is not tied to an embedding here"):
        veneer.attach(FAMILIES["llama"].model(), veneer.InvertibleAdapter())


def test_one_method_stacked_on_itself_shares_twice(tmp_path):
    model = FAMILIES["llama"].model()
    method = veneer.Compacter(width=8)
    perturb(veneer.attach(model, (method, method)))
    veneer.save(veneer.adapters(model)["default"], tmp_path)
    fresh = FAMILIES["llama"].model()
    veneer.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, text()), logits(model, text()))


def test_layers_of_a_plain_model():
    block = lambda: torch.nn.ModuleDict({"inner": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})  # noqa: E731

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([block(), block(), block()])
            self.last = torch.nn.Linear(4, 4)

        def forward(self, x):
            for each in self.blocks:
                x = each["inner"][0](x)
            return self.last(x)

    model, x = Plain(), torch.randn(2, 4)
    adapter = veneer.attach(model, veneer.LoRA(rank=2), "*")
    perturb(adapter)
    for key, parameter in adapter.named_parameters():
        if not key.startswith(("blocks.2", "last")):
            parameter.data.zero_()
    expected = model(x)
    for key, parameter in adapter.named_parameters():
        if not key.startswith(("blocks.2", "last")):
            parameter.data.fill_(1.0)
    with veneer.use(model, adapter, drop_layers=range(2)):
        torch.testing.assert_close(model(x), expected)
    assert (model(x) - expected).abs().max() > 1e-3
