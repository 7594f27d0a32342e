"""The weight methods: what they train and keep, what they refuse, and how they merge beside others."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import FAMILIES, WIDTH, logits, perturb
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import veneer
from veneer.errors import AdapterError, CorruptFile, FileError, MethodError, NotMergeable, Overlap

EXACT = {"rtol": 1e-9, "atol": 1e-9}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def trained(adapter: veneer.Adapter) -> int:
    return sum(parameter.numel() for parameter in adapter.parameters())


def on_meta(kind: type[nn.Module], config) -> nn.Module:
    with torch.device("meta"):
        return kind(config)


def test_bitfit_trains_what_the_paper_counts():
    """BERT-base: 0.09% of the parameters (Ben Zaken et al., table 1: 0.08%, of the large model)."""
    model = on_meta(BertModel, BertConfig())
    adapter = veneer.attach(model, veneer.BitFit())
    assert trained(adapter) == 102_912
    assert veneer.count_parameters(model).percentage == pytest.approx(0.094, abs=1e-3)


def test_ia3_trains_what_the_paper_counts():
    """T5 of 3B parameters: (d_k + d_v + d_ff) a layer, as section 3.3 of Liu et al. has it."""
    config = T5Config(
        d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32, tie_word_embeddings=True, vocab_size=32128
    )
    adapter = veneer.attach(on_meta(T5ForConditionalGeneration, config), veneer.IA3())
    encoder = 24 * (4096 + 4096 + 16384)
    assert trained(adapter) == encoder + encoder


def test_dora_vera_and_oft_train_what_their_papers_count():
    """On LLaMA-7B: DoRA adds a length a row to LoRA; VeRA trains rank + out a layer; OFT in · (b - 1) / 2."""
    model = on_meta(LlamaForCausalLM, LlamaConfig(vocab_size=32000, **LLAMA_7B))
    where = "attention.q | attention.v"
    counts = [
        (veneer.LoRA(rank=16), 32 * 2 * 16 * 8192),
        (veneer.DoRA(rank=16), 32 * 2 * (16 * 8192 + 4096)),
        (veneer.LoRAFA(rank=16), 32 * 2 * 16 * 4096),
        (veneer.VeRA(rank=256), 32 * 2 * (256 + 4096)),
        (veneer.OFT(block_size=32), 32 * 2 * 4096 * 31 // 2),
    ]
    for method, count in counts:
        adapter = veneer.attach(model, method, where)
        assert trained(adapter) == count, method
        veneer.detach(model, adapter)
    assert trained(veneer.attach(model, veneer.LayerNormTuning())) == 65 * 4096


def saved(method: veneer.Method) -> int:
    """Elements that autograd keeps for one backward through an adapted layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    perturb(veneer.attach(model, method, "0"))
    kept: dict[int, int] = {}
    own = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(100, 64)).sum().backward()
    return sum(kept.values())


def test_lora_fa_keeps_no_input():
    """100 inputs of 64 numbers are what LoRA keeps and LoRA-FA does not."""
    assert saved(veneer.LoRA(rank=4)) - saved(veneer.LoRAFA(rank=4)) == 100 * 64


def test_lora_plus_trains_b_of_dora_faster():
    adapter = veneer.attach(FAMILIES["llama"].model(), veneer.DoRA(rank=2), "q_proj")
    slow, fast = adapter.parameter_groups(lr=1e-4, lora_plus_ratio=16)
    assert {id(p) for p in fast["params"]} == {id(claim.delta.B) for claim in adapter.claims}
    assert {id(p) for p in slow["params"]} == {id(p) for c in adapter.claims for p in (c.delta.A, c.delta.m)}


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_told_by_their_parameters(family):
    model = FAMILIES[family].model()
    named = {path for path, module in model.named_modules() if "Norm" in type(module).__name__}
    adapter = veneer.attach(model, veneer.LayerNormTuning())
    assert {claim.place.owner_path for claim in adapter.claims} == named


def test_lora_fa_keeps_a_as_it_was():
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, veneer.LoRAFA(rank=2))
    assert {key.rpartition(".")[2] for key in adapter.state_dict()} == {"A", "B"}
    assert {key.rpartition(".")[2] for key, _ in adapter.named_parameters()} == {"B"}
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".A"))


class Made(TorchDispatchMode):
    """Counts the results of operations by their shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = {"aten.t", "aten.detach", "aten.alias", "aten.view", "aten.transpose"}
        if isinstance(out, torch.Tensor) and out.shape == self.shape and str(func).rsplit(".", 1)[0] not in views:
            self.count += 1
        return out


def test_dora_never_forms_the_changed_weight():
    """Neither forward nor backward makes any tensor of the weight's shape."""
    model = nn.Sequential(nn.Linear(48, 80))
    perturb(veneer.attach(model, veneer.DoRA(rank=3), "0"))
    with Made((80, 48)) as made, Made((48, 80)) as turned:
        model(torch.randn(7, 48, requires_grad=True)).sum().backward()
    assert (made.count, turned.count) == (0, 0)


def test_dora_has_the_lengths_of_the_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9)).double()
    adapter = veneer.attach(model, veneer.DoRA(rank=3, alpha=6.0), "0")
    perturb(adapter)
    delta, x = adapter.claims[0].delta, torch.randn(4, 12).double()
    V = model[0].weight + 2.0 * delta.B @ delta.A
    expected = x @ (delta.m[:, None] * V / V.norm(dim=1, keepdim=True)).T + model[0].bias
    torch.testing.assert_close(model(x), expected, **EXACT)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, ids):
        h = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        return self.attn(h, h, h, need_weights=False)[0]


@pytest.mark.parametrize(
    ("method", "where"),
    [
        (veneer.DoRA(rank=2), "*"),
        (veneer.VeRA(rank=2), "attn"),
        (veneer.OFT(block_size=2), "attn"),
        (veneer.IA3(feedforward="conv"), "table"),
        (veneer.TrainableTokens([3, 4]), "table"),
    ],
)
def test_other_layers_merge_to_what_they_compute(method, where):
    torch.manual_seed(0)
    model = Convolved().double().eval()
    ids = torch.tensor([[1, 2, 3, 4], [3, 9, 9, 0]])
    plain = model(ids)
    adapter = veneer.attach(model, method, where)
    torch.testing.assert_close(model(ids), plain, **EXACT)  # a hook takes the attention off its fused path
    perturb(adapter)
    adapted = model(ids)
    assert (adapted - plain).abs().max() > 1e-3
    veneer.merge(model, adapter, permanent=True)
    torch.testing.assert_close(model(ids), adapted, **EXACT)


def pair(first: veneer.Method, second: veneer.Method, where: str = "q_proj"):
    model = FAMILIES["llama"].model()
    one = veneer.attach(model, first, where, name="one")
    two = veneer.attach(model, second, where, name="two")
    perturb(one)
    perturb(two)
    veneer.activate(model, "one", "two")
    return model, one, two


def answer(model):
    with torch.no_grad():
        return logits(model, FAMILIES["llama"].batch())


SCALE, TURN = veneer.IA3(feedforward=""), veneer.OFT(block_size=8)


@pytest.mark.parametrize(
    ("first", "second", "inner"),
    [
        (SCALE, veneer.LoRA(rank=2), "one"),
        (veneer.LoRA(rank=2), SCALE, "one"),
        (veneer.LoRA(rank=2), TURN, "one"),
        (TURN, veneer.LoRA(rank=2), "two"),
        (TURN, TURN, "two"),
    ],
)
def test_what_does_not_commute_merges_from_the_weight_outwards(first, second, inner):
    """The outer adapter is refused while the inner one acts on activations; in order, both merge to the same answer."""
    model, _, _ = pair(first, second)
    adapted = answer(model)
    outer = {"one": "two", "two": "one"}[inner]
    with pytest.raises(AdapterError, match=f"'{inner}' acts between '{outer}' and the weight"):
        veneer.merge(model, outer)
    assert torch.equal(answer(model), adapted)
    for name in (inner, outer):
        veneer.merge(model, name)
        torch.testing.assert_close(answer(model), adapted, **EXACT)


def test_nothing_is_merged_below_what_measures_the_weight():
    model, _, _ = pair(veneer.LoRA(rank=2), veneer.DoRA(rank=2))
    for act in (veneer.merge, lambda *a: veneer.merge(*a, permanent=True)):
        with pytest.raises(AdapterError, match=r"'two' measures the weight of .*q_proj"):
            act(model, "one")
    other = FAMILIES["llama"].model()
    veneer.attach(other, veneer.LoRA(rank=2), name="one")
    veneer.merge(other, "one")
    veneer.attach(other, veneer.DoRA(rank=2), name="two")
    for act in (veneer.unmerge, veneer.detach):
        with pytest.raises(AdapterError, match="Merge or detach 'two' first"):
            act(other, "one")


@pytest.mark.parametrize(
    "stack", [(SCALE, TURN), (TURN, TURN), (veneer.LoRA(rank=2), SCALE, TURN, TURN), (veneer.DoRA(rank=2), SCALE)]
)
def test_stacked_in_one_adapter_merge_as_they_act(stack):
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, stack, "q_proj | v_proj")
    perturb(adapter)
    adapted = answer(model)
    veneer.merge(model, adapter)
    torch.testing.assert_close(answer(model), adapted, **EXACT)


def test_a_weight_measured_after_a_change_is_not_merged():
    model = FAMILIES["llama"].model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapter = veneer.attach(model, (veneer.LoRA(rank=2), veneer.DoRA(rank=2)), "q_proj")
    perturb(adapter)
    with pytest.raises(NotMergeable, match="DoRA measures the base's weight"):
        veneer.merge(model, adapter)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in before.items())


def test_ia3_merges_biases_and_gives_them_back():
    model = FAMILIES["gpt2"].model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapter = veneer.attach(model, veneer.IA3())
    perturb(adapter)
    veneer.merge(model, adapter)
    bias = model.transformer.h[0].attn.c_attn.bias
    assert torch.equal(bias[:WIDTH], before["transformer.h.0.attn.c_attn.bias"][:WIDTH])
    assert not torch.equal(bias[WIDTH:], before["transformer.h.0.attn.c_attn.bias"][WIDTH:])
    veneer.unmerge(model, adapter)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_a_tied_head_follows_the_tokens():
    model = FAMILIES["gpt2"].model()
    adapter = veneer.attach(model, veneer.TrainableTokens([5, 40]))
    perturb(adapter)
    adapted = answer_of("gpt2", model)
    (value,) = adapter.parameters()
    plain = FAMILIES["gpt2"].model()
    with torch.no_grad():
        plain.transformer.wte.weight[[5, 40]] = value
    torch.testing.assert_close(answer_of("gpt2", plain), adapted, **EXACT)
    veneer.merge(model, adapter, permanent=True)
    torch.testing.assert_close(answer_of("gpt2", model), adapted, **EXACT)


def answer_of(family, model):
    with torch.no_grad():
        return logits(model, FAMILIES[family].batch())


REFUSED = {
    "ids have no scale": (veneer.IA3(feedforward="", inputs=True), "embedding", "inputs are ids"),
    "inputs twice": (veneer.IA3(inputs=True), "mlp.down", "Set feedforward=''"),
    "a table shares no projection": (veneer.VeRA(rank=2), "embedding", "only linear layers can share"),
    "a table does not turn": (TURN, "embedding", "linear layers alone"),
    "blocks that do not fit": (veneer.OFT(block_size=7), "mlp.down", "does not divide the input's width 48"),
    "no bias": (veneer.BitFit(), None, "none of the 21 parameters"),
    "no norm": (veneer.LayerNormTuning(), "mlp.down", "none of the 2 parameters"),
    "no token": (veneer.TrainableTokens([]), None, "empty or names one twice"),
    "a token twice": (veneer.TrainableTokens([3, 3]), None, "empty or names one twice"),
    "a token outside": (veneer.TrainableTokens([64]), None, "outside the vocabulary of 64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name):
    method, where, words = REFUSED[name]
    model = FAMILIES["llama"].model()
    with pytest.raises(MethodError, match=words):
        veneer.attach(model, method, where)
    assert not veneer.adapters(model)


def test_one_role_of_a_fused_projection_has_no_input_of_its_own():
    with pytest.raises(MethodError, match="read the same input"):
        veneer.attach(FAMILIES["gpt2"].model(), TURN, "attention.q")


def test_ia3_says_where_its_feedforward_overlaps():
    with pytest.raises(Overlap):
        veneer.attach(FAMILIES["llama"].model(), veneer.IA3(), "attention.v | mlp.down")


def test_weights_read_without_a_call():
    for method, words in ((SCALE, "read without a call"), (veneer.VeRA(rank=2, dropout=0.1), "Set dropout=0.0")):
        with pytest.raises(MethodError, match=words):
            veneer.attach(Convolved(), method, "attn")


def test_vera_draws_its_projections_again(tmp_path):
    """Without save_projection the file holds no A and B, and the seed gives them again."""
    model = FAMILIES["bert"].model()
    adapter = veneer.attach(model, veneer.VeRA(rank=3, seed=9, save_projection=False), "attention.q")
    perturb(adapter)
    assert {key.rpartition(".")[2] for key in adapter.state_dict()} == {"b", "d"}
    veneer.save(adapter, tmp_path)
    other = FAMILIES["bert"].model()
    veneer.load(other, tmp_path)
    assert torch.equal(answer_of("bert", other), answer_of("bert", model))


def damaged(tmp_path, peft_type, **change):
    methods = {"OFT": veneer.OFT(block_size=8, num_cayley_neumann_terms=5), "IA3": veneer.IA3()}
    method = methods.get(peft_type, veneer.LoRA(rank=2))
    veneer.save(veneer.attach(FAMILIES["llama"].model(), method), tmp_path)
    (tmp_path / "veneer.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("peft_type", "change", "kind", "words"),
    [
        ("OFT", {"peft_version": "0.17.1"}, FileError, "before PEFT 0.18"),
        ("OFT", {"coft": True}, FileError, "uses coft"),
        ("OFT", {"oft_block_size": 1}, CorruptFile, "no config of a OFT"),
        ("OFT", {"bias": "all"}, FileError, "has biases"),
        ("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj", "up_proj"]}, CorruptFile, "tensors are missing"),
        ("LORA", {"use_dora": True}, CorruptFile, "lora_magnitude_vector and 10 more missing"),
        ("IA3", {"feedforward_modules": "("}, CorruptFile, "no regular expression"),
    ],
)
def test_foreign_configs_are_refused_by_name(tmp_path, peft_type, change, kind, words):
    with pytest.raises(kind, match=words):
        veneer.load(FAMILIES["llama"].model(), damaged(tmp_path, peft_type, **change))


def test_a_sequence_would_run_what_is_shared():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    with pytest.raises(veneer.errors.PlaceError, match=r"An nn\.Sequential runs every child it has"):
        veneer.attach(model, veneer.VeRA(rank=2), "*")
    assert model(torch.ones(1, 8)).shape == (1, 4)
