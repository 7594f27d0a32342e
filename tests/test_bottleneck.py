"""Bottleneck adapters against references written by hand, their counts, their options, and layers left to the base."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, SIZES, TOKENS, VOCABULARY, logits, perturb, text
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


def test_weights_stay_float32_and_activations_bfloat16():
    model = FAMILIES["bert"].model().bfloat16()
    adapter = attached(model, "after_residual", norm=True)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert logits(model, FAMILIES["bert"].batch()).dtype == torch.bfloat16


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


def test_a_merged_adapter_cannot_be_dropped():
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, veneer.LoRA(rank=2))
    veneer.merge(model, adapter)
    with pytest.raises(veneer.errors.AdapterError, match="merged into the weights"):
        veneer.activate(model, adapter, drop_layers=[0])
