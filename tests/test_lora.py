"""LoRA: every option changes the run or is refused, and every kind of layer equals W + s·B·A computed by hand."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from tiny import FAMILIES, logits, perturb
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from veneer import errors
from veneer.ops.dropout import draw


class Holder(nn.Module):
    """One layer, called."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def linear(width=32, out=32, **options):
    torch.manual_seed(0)
    return Holder(nn.Linear(width, out, dtype=torch.float64, **options))


def only(adapter):
    (claim,) = adapter.claims
    return claim.delta


def attach(model, lora=None, where="layer", **options):
    adapter = veneer.attach(model, lora or veneer.LoRA(rank=2, alpha=3.0), where, **options)
    perturb(adapter)
    return adapter


def data(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Every kind of layer, against the dense weight


def by_hand(A, B, scale):
    """s·B·A in the logical shape of the weight, in float64."""
    A, B = A.detach().double(), B.detach().double()
    return scale * torch.einsum("or,ri->oi", B.reshape(len(B), -1), A.reshape(len(A), -1)).reshape(-1, *A.shape[1:])


def convolution(kind, **options):
    shape = [2, 3] + [7] * kind
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[kind - 1]
    return lambda: (layer(3, 5, **{"kernel_size": 3, **options}), (data(*shape),))


LAYERS = {
    "linear": lambda: (nn.Linear(6, 5), (data(2, 3, 6),)),
    "linear without bias": lambda: (nn.Linear(6, 5, bias=False), (data(4, 6),)),
    "linear of one vector": lambda: (nn.Linear(6, 5), (data(6),)),
    "Conv1D": lambda: (Conv1D(5, 6), (data(2, 3, 6),)),
    "embedding": lambda: (nn.Embedding(9, 5), (torch.tensor([[1, 8, 0], [3, 3, 2]]),)),
    "embedding with padding": lambda: (nn.Embedding(9, 5, padding_idx=3), (torch.tensor([[1, 8], [3, 2]]),)),
    **{f"conv{d}d": convolution(d) for d in (1, 2, 3)},
    **{f"conv{d}d strided": convolution(d, stride=2, padding=1, dilation=2) for d in (1, 2, 3)},
    **{f"conv{d}d same": convolution(d, padding="same", kernel_size=4) for d in (1, 2)},
    "conv2d oblong": convolution(2, kernel_size=(1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "conv2d pointwise": convolution(2, kernel_size=1),
    **{
        f"conv{d}d {mode}": convolution(d, padding=2, padding_mode=mode)
        for d in (1, 2, 3)
        for mode in ("reflect", "replicate", "circular")
    },
    "conv2d same reflect": convolution(2, padding="same", padding_mode="reflect", kernel_size=4),
    "conv2d of one image": lambda: (nn.Conv2d(3, 5, 3), (data(3, 7, 7),)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_adapted_equals_dense(name):
    torch.manual_seed(0)
    layer, args = LAYERS[name]()
    model = Holder(layer.double())
    dense = copy.deepcopy(model)
    pair = only(attach(model))
    change = by_hand(pair.A, pair.B, 3.0 / 2)
    transposed = isinstance(layer, (Conv1D, nn.Embedding))
    with torch.no_grad():
        before = dense(*args).clone()
        dense.layer.weight.add_(change.T if transposed else change)
        wanted = dense(*args)
        assert (wanted - before).abs().max() > 1e-3
        torch.testing.assert_close(model(*args), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(*args), wanted, rtol=1e-10, atol=1e-10)  # and with gradients
    veneer.merge(model, "default", permanent=True)
    torch.testing.assert_close(model.layer.weight, dense.layer.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("apart", [False, True], ids=["fused", "k and v of other widths"])
def test_multihead_attention_equals_dense(apart):
    torch.manual_seed(0)
    widths = {"kdim": 6, "vdim": 10} if apart else {}
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **widths).double().eval()
    q, k, v = data(2, 3, 8), data(2, 4, widths.get("kdim", 8), seed=2), data(2, 4, widths.get("vdim", 8), seed=3)
    model = Holder(layer)
    dense = copy.deepcopy(model)
    adapter = attach(model)
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if apart else ["in_proj_weight"]
    assert [c.place.path for c in adapter.claims] == [f"layer.{n}" for n in names] + ["layer.out_proj"]
    with torch.no_grad():
        for claim in adapter.claims:
            stored = dense.get_parameter(f"{claim.place.owner_path}.{claim.place.parameter}")
            stored.add_(by_hand(claim.delta.A, claim.delta.B, 1.5))
        wanted, _ = dense(q, k, v)
        torch.testing.assert_close(model(q, k, v)[0], wanted, rtol=1e-10, atol=1e-10)
    answer, _ = model(q, k, v)
    torch.testing.assert_close(answer, wanted, rtol=1e-10, atol=1e-10)
    answer.pow(2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert not any(name in vars(m) for m in model.modules() for name in ("weight", *names)), "a shadow stayed"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("padded", [False, True])
def test_the_encoders_fast_path_sees_the_adapter(padded):
    """In evaluation without gradients torch runs a fused kernel that calls no module inside the layer."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = Holder(nn.TransformerEncoder(block, 2, enable_nested_tensor=padded)).eval()
    dense = copy.deepcopy(model)
    adapter = attach(model, where="layer.layers.*")
    assert len(adapter.claims) == 8
    x = torch.randn(3, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]]) if padded else None
    with torch.no_grad():
        for claim in adapter.claims:
            stored = dense.get_parameter(f"{claim.place.owner_path}.{claim.place.parameter}")
            stored.add_(by_hand(claim.delta.A, claim.delta.B, 1.5).float())
    keep = slice(None) if mask is None else ~mask
    with torch.no_grad():
        fast, wanted = (m(x, src_key_padding_mask=mask) for m in (model, dense))
    torch.testing.assert_close(fast[keep], wanted[keep], rtol=1e-4, atol=1e-4)
    if not padded:  # with gradients torch itself refuses the nested tensors that it makes of padding
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    with veneer.use(model):
        assert not torch.allclose(model(x, src_key_padding_mask=mask)[keep], fast[keep])


def test_layers_that_have_no_low_rank_change_are_refused():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3

    for layer, words in [
        (nn.Conv2d(4, 4, 3, groups=2), "LoRA at layer: a Conv2d with groups=2 has a block-diagonal weight"),
        (Scaled(4, 4), "LoRA at layer: Scaled computes more than a lookup"),
        (nn.Embedding(4, 4, max_norm=1.0), "LoRA at layer: an Embedding with max_norm rewrites its weight"),
    ]:
        model = Holder(layer)
        with pytest.raises(errors.MethodError) as caught:
            veneer.attach(model, veneer.LoRA(rank=2), "layer")
        assert str(caught.value).startswith(words)
        assert not veneer.adapters(model)
        assert all(p.requires_grad for p in model.parameters())
    for layer in (nn.LayerNorm(4), nn.Bilinear(2, 2, 2), nn.LSTM(2, 2), nn.ConvTranspose1d(2, 2, 3)):
        with pytest.raises(errors.NoSuchPlace):
            veneer.attach(Holder(layer), veneer.LoRA(rank=2), "layer")


def test_a_linear_of_its_own_forward_is_changed_where_it_reads_its_weight():
    """A subclass that scales its output: a change beside it would miss the scale."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 3

    model = Holder(Scaled(4, 4, dtype=torch.float64))
    dense = copy.deepcopy(model)
    adapter = attach(model)
    with torch.no_grad():
        dense.layer.weight.add_(by_hand(adapter.claims[0].delta.A, adapter.claims[0].delta.B, 1.5))
    torch.testing.assert_close(model(data(2, 4)), dense(data(2, 4)))


# Options


def test_rank():
    for rank in (1, 5, 64):
        pair = only(veneer.attach(linear(6, 4), veneer.LoRA(rank=rank), "layer"))
        assert (pair.A.shape, pair.B.shape) == ((rank, 6), (4, rank))
        assert not pair.B.any()


@pytest.mark.parametrize(
    ("lora", "scale"),
    [
        (veneer.LoRA(rank=4), 4.0),
        (veneer.LoRA(rank=8, alpha=4.0), 0.5),
        (veneer.LoRA(rank=4, alpha=6), 1.5),
        (veneer.LoRA(rank=4, alpha=6.0, use_rslora=True), 3.0),
        (veneer.LoRA(rank=9, alpha=-3.0, use_rslora=True), -1.0),
        (veneer.LoRA(rank=4, alpha=0.0), 0.0),
    ],
    ids=str,
)
def test_alpha_and_scale(lora, scale):
    model = linear()
    pair = only(attach(model, lora))
    assert pair.scale == pytest.approx(scale)
    x = data(3, 32)
    wanted = nn.functional.linear(x, model.layer.weight + scale * pair.B @ pair.A, model.layer.bias)
    torch.testing.assert_close(model(x), wanted)


def test_dropout_acts_in_training_only():
    x = data(500, 32)
    models = {}
    for p in (0.0, 0.5):
        models[p] = linear()  # which sets the seed, so that both start alike
        attach(models[p], veneer.LoRA(rank=2, dropout=p))
        models[p].eval()
    assert torch.equal(models[0.0](x), models[0.5](x))
    for model in models.values():
        model.train()
    plain, first, second = models[0.0](x), models[0.5](x), models[0.5](x)
    assert torch.equal(plain, models[0.0](x))
    assert not torch.equal(first, second)
    pair = only(veneer.adapters(models[0.5])["default"])
    torch.manual_seed(5)
    dropout = draw(x, 0.5)
    dropped = dropout(x) * dropout.scale
    torch.manual_seed(5)
    layer = models[0.5].layer
    wanted = nn.functional.linear(x, layer.weight, layer.bias) + pair.scale * dropped @ pair.A.T @ pair.B.T
    torch.testing.assert_close(models[0.5](x), wanted)


def test_a_site_takes_the_mode_of_its_module():
    model = linear().eval()
    assert not only(attach(model, veneer.LoRA(rank=2, dropout=0.5))).dropout.training
    assert only(attach(linear().train(), veneer.LoRA(rank=2, dropout=0.5))).dropout.training


def test_dropout_where_no_call_is_made_is_refused():
    model = Holder(nn.MultiheadAttention(8, 2))
    with pytest.raises(errors.MethodError) as caught:
        veneer.attach(model, veneer.LoRA(rank=2, dropout=0.1), "layer")
    assert str(caught.value) == (
        "LoRA at layer.in_proj_weight: The weight is read without a call that LoRA could drop inputs of. Set "
        "dropout=0.0."
    )


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [(nn.Linear(400, 8), 400), (nn.Conv2d(40, 8, 3), 360), (nn.Conv1d(40, 8, 5), 200), (nn.Embedding(400, 8), 1)],
    ids=["linear", "conv2d", "conv1d", "embedding"],
)
def test_kaiming_is_uniform_within_one_over_root_fan_in(layer, fan_in):
    torch.manual_seed(0)
    A = only(veneer.attach(Holder(layer), veneer.LoRA(rank=64), "layer")).A.detach()
    bound = 1 / math.sqrt(fan_in)
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.99 * bound
    assert A.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert abs(A.mean()) < 0.03 * bound


@pytest.mark.parametrize("rank", [4, 32])
def test_gaussian_has_std_one_over_rank(rank):
    torch.manual_seed(0)
    A = only(veneer.attach(linear(2000, 4), veneer.LoRA(rank=rank, init="gaussian"), "layer")).A.detach()
    assert A.std() == pytest.approx(1 / rank, rel=0.03)
    assert A.abs().max() > 2 / rank


def test_orthogonal_rows():
    A = only(veneer.attach(linear(40, 4), veneer.LoRA(rank=8, init="orthogonal"), "layer")).A
    torch.testing.assert_close(A @ A.T, torch.eye(8, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_the_seed_decides_the_start():
    def start(seed):
        model = linear()
        torch.manual_seed(seed)
        return only(veneer.attach(model, veneer.LoRA(rank=2), "layer")).A

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def biases(adapter):
    return [c.place.path for c in adapter.claims if isinstance(c.method, veneer.FullFineTuning)]


def test_bias():
    every = [name for name, _ in FAMILIES["bert"].model().named_parameters() if name.endswith("bias")]
    wanted = {
        "none": [],
        "lora_only": [f"bert.encoder.layer.{i}.attention.self.query.bias" for i in range(2)],
        "all": every,
    }
    for bias, paths in wanted.items():
        model = FAMILIES["bert"].model()
        base = logits(model, FAMILIES["bert"].batch())
        adapter = veneer.attach(model, veneer.LoRA(rank=2, bias=bias), "attention.q")
        assert sorted(biases(adapter)) == sorted(paths)
        assert torch.equal(logits(model, FAMILIES["bert"].batch()), base)
        with torch.no_grad():
            for claim in adapter.claims[2:]:
                claim.delta.value.add_(0.1)
        assert torch.equal(logits(model, FAMILIES["bert"].batch()), base) == (not paths)
        veneer.detach(model, adapter)
        assert torch.equal(logits(model, FAMILIES["bert"].batch()), base)


def test_bias_that_is_not_there_is_refused():
    for bias, kind, words in [
        ("lora_only", errors.MethodError, "no adapted layer has a bias"),
        ("all", errors.PlaceError, "bias"),
    ]:
        with pytest.raises(kind, match=words):
            veneer.attach(FAMILIES["llama"].model(), veneer.LoRA(rank=2, bias=bias), "attention.q")


def ranks(model, **options):
    lora = veneer.LoRA(rank=4, **options)
    return {c.place.path: (c.delta.rank, c.delta.scale) for c in veneer.attach(model, lora, "attention").claims}


def test_patterns():
    found = ranks(
        FAMILIES["llama"].model(),
        rank_pattern={"layers.1.self_attn.q_proj": 7, "q_proj": 3, "re:.*layers\\.0.*[vo]_proj": 2},
        alpha_pattern={"*.v_proj": 8.0},
    )
    for path, (rank, scale) in found.items():
        block, name = path.split(".")[2], path.rpartition(".")[2]
        wanted = {("1", "q_proj"): 7, ("0", "q_proj"): 3, ("0", "v_proj"): 2, ("0", "o_proj"): 2}.get((block, name), 4)
        assert rank == wanted, path
        assert scale == (8.0 if name == "v_proj" else 16.0) / wanted


def test_the_first_pattern_holds():
    model = FAMILIES["llama"].model()
    found = ranks(model, rank_pattern={"q_proj": 3, "layers.1.self_attn.q_proj": 7})
    assert {rank for path, (rank, _) in found.items() if path.endswith("q_proj")} == {3}


def test_a_pattern_names_a_fused_role():
    found = ranks(FAMILIES["gpt2"].model(), rank_pattern={"c_attn[q]": 2})
    assert {path.rpartition(".")[2]: rank for path, (rank, _) in found.items()} == {
        "c_attn[q]": 2,
        "c_attn[k]": 4,
        "c_attn[v]": 4,
        "c_proj": 4,
    }


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_refused(option):
    for pattern in ("q_prj", "proj", "re:q_proj", "mlp.up_proj"):
        with pytest.raises(errors.MethodError) as caught:
            ranks(FAMILIES["llama"].model(), **{option: {pattern: 3}})
        assert str(caught.value) == f"The pattern '{pattern}' matches none of LoRA's 8 places."


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": 2.0},
        {"rank": "2"},
        {"rank": True},
        {"rank": None},
        {"alpha": "16"},
        {"alpha": None},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": float("nan")},
        {"use_rslora": 1},
        {"init": "zeros"},
        {"bias": "some"},
        {"bias": True},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": 2.5}},
        {"rank_pattern": {3: 2}},
        {"rank_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": "4"}},
        {"alpha_pattern": {"q_proj": float("nan")}},
    ],
    ids=str,
)
def test_values_that_an_option_cannot_have(options):
    (name,) = options
    with pytest.raises(errors.MethodError, match=rf"^LoRA\({name}="):
        veneer.LoRA(**options)


def test_unknown_options_and_changed_ones():
    with pytest.raises(TypeError, match="lora_alpha"):
        veneer.LoRA(lora_alpha=3)
    with pytest.raises(AttributeError):
        veneer.LoRA().rank = 3


def test_no_method():
    for wrong in (veneer.LoRA, "LoRA", None, (veneer.LoRA(), "x")):
        with pytest.raises(errors.MethodError, match=r"attach takes methods such as veneer\.LoRA\(rank=8\), not"):
            veneer.attach(linear(), wrong, "layer")


# Parameters, counts, dtypes


def test_parameter_groups():
    adapter = veneer.attach(FAMILIES["bert"].model(), veneer.LoRA(rank=2, bias="lora_only"), "attention.q")
    (group,) = adapter.parameter_groups(lr=1e-3)
    assert group["lr"] == 1e-3
    assert [id(p) for p in group["params"]] == [id(p) for p in adapter.parameters()]
    slow, fast = adapter.parameter_groups(lr=1e-3, lora_plus_ratio=16.0)
    assert (slow["lr"], fast["lr"]) == (1e-3, 1.6e-2)
    named = {id(p): key for key, p in adapter.named_parameters()}
    assert all(named[id(p)].endswith(".B") for p in fast["params"])
    assert not any(named[id(p)].endswith(".B") for p in slow["params"])
    assert len(fast["params"]) == 2
    assert len(slow["params"]) == 4
    torch.optim.AdamW([slow, fast]).step()
    whole = veneer.attach(FAMILIES["bert"].model(), veneer.FullFineTuning(), "*.bias")
    with pytest.raises(errors.MethodError, match="has no B for lora_plus_ratio to act on"):
        whole.parameter_groups(lr=1e-3, lora_plus_ratio=16.0)


def test_the_collector_of_cycles_runs_again_after_attaching_and_after_a_refusal():
    model = FAMILIES["gpt2"].model()
    veneer.attach(model, veneer.LoRA(rank=2))
    assert gc.isenabled()
    with pytest.raises(errors.PlaceError, match="default"):
        veneer.attach(model, veneer.LoRA(rank=2))
    assert gc.isenabled()


def test_count_of_the_paper():
    with torch.device("meta"):
        model = Holder(nn.Linear(4096, 4096))
    adapter = veneer.attach(model, veneer.LoRA(rank=8), "layer")
    assert sum(p.numel() for p in adapter.parameters()) == 65_536
    count = veneer.count_parameters(model)
    assert (count.trainable, count.total) == (65_536, 65_536 + 4096 * 4097)
    assert str(count) == "65,536 of 16,846,848 parameters trainable (0.389%)"


def test_shared_parameters_count_once():
    model = FAMILIES["gpt2"].model()
    unique = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert unique < sum(t.numel() for t in model.state_dict().values())
    assert veneer.count_parameters(model) == veneer.ParameterCount(unique, unique)
    veneer.attach(model, veneer.LoRA(rank=2), "embedding | head")
    assert veneer.count_parameters(model) == veneer.ParameterCount(2 * 2 * (64 + 32), unique + 2 * 2 * (64 + 32))


@pytest.mark.parametrize(
    ("base", "asked", "dtype"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtypes(base, asked, dtype):
    model = linear().to(base)
    adapter = attach(model, dtype=asked)
    assert {p.dtype for p in adapter.parameters()} == {dtype}
    y = model(torch.ones(2, 32, dtype=base))
    assert y.dtype == base
    y.float().pow(2).sum().backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {dtype}
    assert model.layer.weight.dtype == base


def test_backward_keeps_no_wide_copy_of_the_activations():
    model = linear(256, 256).to(torch.bfloat16)
    attach(model, veneer.LoRA(rank=2))
    x = torch.randn(1000, 256).bfloat16().requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert y.dtype == torch.bfloat16
    wide = [t for t in kept.values() if t.dtype != torch.bfloat16]
    assert all(t.numel() < x.numel() for t in wide), "a float32 copy of the activations is kept"
    size = sum(t.untyped_storage().nbytes() for t in kept.values())
    allowed = x.nbytes + model.layer.weight.nbytes + 2 * 1000 * 2 * 2 + 4 * 2 * 256 * 4
    assert x.nbytes <= size <= allowed


def test_autocast_runs_in_its_dtype():
    model = linear().float()
    adapter = attach(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.ones(2, 32))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(y.float(), model(torch.ones(2, 32)), rtol=0.05, atol=0.05)
