"""LoRA's starts from the weight and from activations: what they are, what they leave alone, and what they refuse."""

import copy

import pytest
import torch
from tiny import FAMILIES, logits, perturb
from torch import nn

import veneer
from veneer import errors


def linear(inputs=12, outputs=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs)).double()


def only(adapter):
    (claim,) = adapter.claims
    return claim.delta


def test_pissa_starts_with_the_best_product_of_its_rank():
    model = linear()
    delta = only(veneer.attach(model, veneer.LoRA(rank=3, alpha=6.0, init="pissa"), "0"))
    W = model[0].weight.detach()
    U, S, V = torch.linalg.svd(W)
    torch.testing.assert_close(delta.scale * delta.B.detach() @ delta.A.detach(), U[:, :3] @ S[:3].diag() @ V[:3])
    torch.testing.assert_close(delta.A.norm(dim=1), delta.B.norm(dim=0))


def test_the_quick_decomposition_leaves_hardly_more_than_the_exact_one():
    left = []
    for init in ("pissa", "pissa_niter_16"):
        model = linear(64, 48)
        delta = only(veneer.attach(model, veneer.LoRA(rank=4, alpha=4.0, init=init), "0"))
        left.append((model[0].weight - delta.B @ delta.A).norm().item())
    assert left[0] <= left[1] * (1 + 1e-9)
    assert left[1] < 1.01 * left[0] < 0.95 * model[0].weight.norm().item()


def test_olora_starts_with_an_orthonormal_b():
    model = linear()
    delta = only(veneer.attach(model, veneer.LoRA(rank=3, init="olora"), "0"))
    torch.testing.assert_close(delta.B.T @ delta.B, torch.eye(3, dtype=torch.float64))
    assert torch.equal(delta.A.detach().tril(-1), torch.zeros(3, 12, dtype=torch.float64))
    torch.testing.assert_close(delta.B @ delta.B.T @ model[0].weight, delta.B @ delta.A)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_the_start_is_saved_and_never_trained(init):
    model = linear()
    adapter = veneer.attach(model, veneer.LoRA(rank=2, init=init), "0")
    assert [key for key, _ in adapter.named_parameters()] == ["0.0.A", "0.0.B"]
    assert sorted(adapter.state_dict()) == ["0.0.A", "0.0.A0", "0.0.B", "0.0.B0"]
    assert torch.equal(only(adapter).A0, only(adapter).A)
    assert not only(adapter).A0.requires_grad
    assert sum(p.numel() for p in adapter.parameters()) == 2 * (12 + 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_at_the_start_in_any_precision(dtype):
    model = linear(64, 48).to(dtype)
    x = torch.randn(5, 64, dtype=dtype)
    before = model(x)
    adapter = veneer.attach(model, veneer.LoRA(rank=8, init="pissa"), "0")
    assert torch.equal(model(x), before)
    assert only(adapter).A.dtype == torch.float32


@pytest.mark.parametrize("model", [nn.Embedding(11, 8), nn.Conv2d(3, 6, (3, 2)), nn.MultiheadAttention(8, 2)])
def test_other_layers_start_from_their_weights_too(model):
    holder = nn.Sequential(model)
    adapter = veneer.attach(holder, veneer.LoRA(rank=2, init="pissa", alpha=2.0), "*")
    for claim in adapter.claims:
        W = claim.place.read().flatten(1)
        near = (claim.delta.map.product(claim.delta.A, claim.delta.B) * claim.delta.scale).flatten(1)
        assert torch.linalg.matrix_norm(W - near, 2) <= torch.linalg.svdvals(W)[2] * 1.001


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 11, "init": "pissa"}, "has 10 directions of this weight, not rank=11"),
        ({"rank": 11, "init": "olora"}, "has 10 directions of this weight, not rank=11"),
        ({"rank": 13, "init": "eva"}, "has 12 directions of the inputs, not 13"),
        ({"rank": 2, "init": "pissa", "alpha": -1.0}, "divides by the scale, which is -0.5"),
    ],
)
def test_what_a_layer_cannot_start_from(options, words):
    with pytest.raises(errors.MethodError, match=f"LoRA at 0: .*{words}"):
        veneer.attach(linear(), veneer.LoRA(**options), "0")


@pytest.mark.parametrize("model", [nn.Embedding(11, 8), nn.Conv1d(3, 6, 3), nn.MultiheadAttention(8, 2)])
def test_eva_needs_activations_of_a_linear_layer(model):
    with pytest.raises(errors.MethodError, match="init='eva' needs"):
        veneer.attach(nn.Sequential(model), veneer.LoRA(rank=2, init="eva"), "*")


def test_loading_decomposes_nothing(tmp_path, monkeypatch):
    model = linear()
    adapter = veneer.attach(model, veneer.LoRA(rank=2, init="pissa"), "0")
    perturb(adapter)
    veneer.save(adapter, tmp_path)
    monkeypatch.setattr("veneer.pairs.factors", None)
    loaded = veneer.load(linear(), tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in adapter.state_dict().items())


def batches(count=3):
    generator = torch.Generator().manual_seed(4)
    batch = FAMILIES["llama"].batch()
    return [batch | {"input_ids": torch.randint(2, 60, (3, 6), generator=generator)} for _ in range(count)]


def test_eva_starts_with_the_main_directions_of_the_inputs():
    model = FAMILIES["llama"].model()
    adapter = veneer.attach(model, veneer.LoRA(rank=32, init="eva"), "layers.1.*.q_proj")
    seen = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    veneer.calibrate(model, adapter, batches())
    hook.remove()
    delta = only(adapter)
    V = torch.linalg.svd(torch.cat(seen).flatten(0, 1)).Vh
    torch.testing.assert_close((delta.A.detach() @ V.T).abs(), torch.eye(32, dtype=torch.float64), atol=1e-6, rtol=0)
    assert not delta.B.any()


def test_one_batch_gives_a_small_rank_exactly_too_and_padding_is_not_seen():
    found = []
    for pad in (0, 3):
        model = FAMILIES["llama"].model()
        adapter = veneer.attach(model, veneer.LoRA(rank=2, init="eva"), "layers.1.*.q_proj")
        (batch,) = batches(1)
        batch = {key: nn.functional.pad(value, (0, pad)) for key, value in batch.items()}
        veneer.calibrate(model, adapter, [batch])
        found.append(only(adapter).A.detach())
    torch.testing.assert_close((found[0] @ found[1].T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)


def test_eva_is_refused_until_it_was_calibrated(tmp_path):
    model, batch = FAMILIES["llama"].model(), FAMILIES["llama"].batch()
    before = logits(model, batch)
    adapter = veneer.attach(model, veneer.LoRA(rank=2, init="eva"))
    with pytest.raises(errors.AdapterError, match=r"Call veneer\.calibrate\(model, adapter, batches\) first"):
        logits(model, batch)
    with pytest.raises(errors.AdapterError, match="has not started yet"):
        veneer.save(adapter, tmp_path)
    with pytest.raises(errors.AdapterError, match=r"Call veneer\.calibrate"):
        veneer.merge(model, adapter)
    with pytest.raises(errors.AdapterError, match="saw 0 inputs with 0 directions among them, fewer than rank=2"):
        veneer.calibrate(model, adapter, [])
    veneer.calibrate(model, adapter, [batch])
    assert torch.equal(logits(model, batch), before)
    with pytest.raises(errors.AdapterError, match="does not wait for any inputs"):
        veneer.calibrate(model, adapter, [batch])
    assert not any(module._forward_pre_hooks for module in model.modules())
    veneer.save(adapter, tmp_path)
    loaded = veneer.load(copy.deepcopy(FAMILIES["llama"].model()), tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in adapter.state_dict().items())


@pytest.fixture
def quantized(monkeypatch):
    """A dense layer, and the same one stored as 4-bit numbers."""
    pytest.importorskip("bitsandbytes")
    from test_quantized import quantize

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 48, bias=False))
    return dense, nn.Sequential(quantize(copy.deepcopy(dense[0]), "nf4"))


def test_loftq_starts_with_what_quantizing_lost(quantized, tmp_path):
    dense, model = quantized
    adapter = veneer.attach(model, veneer.LoRA(rank=16, alpha=8.0, init="loftq"), "0")
    with pytest.raises(errors.AdapterError, match=r"Call veneer\.calibrate\(model, adapter, dense_model\) first"):
        model(torch.randn(2, 64))
    with pytest.raises(errors.AdapterError, match="has not started yet"):
        veneer.save(adapter, tmp_path)
    with pytest.raises(errors.AdapterError, match="does not wait for any inputs"):
        veneer.calibrate(model, adapter, [])
    with pytest.raises(errors.AdapterError, match=r"Sequential has no dense weight of shape \(48, 64\) at 0"):
        veneer.calibrate(model, adapter, nn.Sequential(nn.Linear(5, 48)))
    veneer.calibrate(model, adapter, dense)
    delta = only(adapter)
    lost = dense[0].weight.detach() - adapter.claims[0].place.read().float()
    left = lost - delta.scale * delta.B.detach() @ delta.A.detach()
    torch.testing.assert_close(left.norm() ** 2, torch.linalg.svdvals(lost)[16:].square().sum(), rtol=1e-4, atol=0)
    x = torch.randn(100, 64)
    with torch.no_grad():
        near = (model(x) - dense(x)).norm()
        with veneer.use(model):
            assert near < 0.8 * (model(x) - dense(x)).norm()
    veneer.save(adapter, tmp_path)
    loaded = veneer.load(model, tmp_path, name="again")
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in adapter.state_dict().items())


def test_loftq_is_refused_where_nothing_was_lost():
    with pytest.raises(errors.MethodError, match=r"this weight is stored as torch\.float64\. Quantize the base first"):
        veneer.attach(linear(), veneer.LoRA(rank=2, init="loftq"), "0")


def test_pissa_acts_on_a_quantized_base_too(quantized):
    _, model = quantized
    x = torch.randn(3, 64)
    before = model(x)
    adapter = veneer.attach(model, veneer.LoRA(rank=4, init="pissa"), "0")
    assert torch.equal(model(x), before)
    perturb(adapter)
    assert (model(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_every_matrix_of_a_stack_starts_for_itself(init, tmp_path):
    family = FAMILIES["mixtral"]
    model, batch = family.model(), family.batch()
    before = logits(model, batch)
    adapter = veneer.attach(model, veneer.LoRA(rank=2, init=init), "*.down_proj")
    assert torch.equal(logits(model, batch), before)
    for claim in adapter.claims:
        assert len(claim.place.shape) == 3
        for W, A, B in zip(claim.place.read(), claim.delta.A.detach(), claim.delta.B.detach(), strict=True):
            left = (W - claim.delta.scale * B @ A) if init == "pissa" else (W - B @ B.T @ W)
            assert left.norm() < 0.99 * W.norm()
    perturb(adapter)
    veneer.save(adapter, tmp_path)
    other = family.model()
    veneer.load(other, tmp_path)
    assert torch.equal(logits(other, batch), logits(model, batch))


@pytest.mark.parametrize("method", [veneer.AdaLoRA(total_steps=9), veneer.SHiRA(rank=1), veneer.MiSS(rank=2)])
def test_stacks_are_refused_where_a_method_does_not_act_on_them(method):
    with pytest.raises(errors.MethodError, match=r"stacks of matrices|linear layers only"):
        veneer.attach(FAMILIES["mixtral"].model(), method, "*.down_proj")


@pytest.mark.parametrize("method", [veneer.DoRA, veneer.LoRAFA])
def test_kin_of_lora_have_no_such_start(method):
    with pytest.raises(errors.MethodError, match=r"init='pissa' starts plain LoRA only\. Use one of kaiming"):
        veneer.attach(linear(), method(rank=2, init="pissa"), "0")


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (veneer.MiSS(rank=64), 64 * 4096),
        (veneer.MiSS(rank=64, mini_rank=512), 64 * 512),
        (veneer.HiRA(rank=32), 32 * (4096 + 4096)),
        (veneer.LoHa(rank=8), 2 * 8 * (4096 + 4096)),
        (veneer.SHiRA(rank=32), 32 * (4096 + 4096)),
        (veneer.AdaLoRA(total_steps=10, initial_rank=12), 12 * (4096 + 4096 + 1)),
        (veneer.LoRA(rank=8, init="pissa"), 8 * (4096 + 4096)),
    ],
    ids=str,
)
def test_the_papers_parameter_counts(method, count):
    model = nn.Sequential(nn.Linear(4096, 4096, device="meta"))
    adapter = veneer.attach(model, method, "0")
    assert sum(parameter.numel() for parameter in adapter.parameters()) == count


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (veneer.MiSS(rank=13), "rank=13 is above the 12 inputs"),
        (veneer.MiSS(rank=2, mini_rank=3), "10 outputs are no multiple of 3"),
        (veneer.SHiRA(rank=6), "rank=6 means 132 entries of a weight that has 120"),
    ],
)
def test_what_does_not_fit_a_weight(method, words):
    with pytest.raises(errors.MethodError, match=words):
        veneer.attach(linear(), method, "0")


def test_a_schedule_that_cuts_nothing_is_refused():
    for options in ({"warmup": 5, "final": 5}, {"initial_rank": 4, "target_rank": 5}):
        with pytest.raises(errors.MethodError, match="cuts nothing"):
            veneer.attach(linear(), veneer.AdaLoRA(total_steps=10, **options), "0")
    with pytest.raises(errors.MethodError, match="'nothing' matches none of AdaLoRA's 1 places"):
        veneer.attach(linear(), veneer.AdaLoRA(total_steps=10, rank_pattern={"nothing": 2}), "0")


@pytest.mark.parametrize("method", [veneer.AdaLoRA(total_steps=9, dropout=0.1), veneer.MiSS(rank=2, dropout=0.1),
                                    veneer.HiRA(rank=2, dropout=0.1)])  # fmt: skip
def test_dropout_needs_a_call(method):
    with pytest.raises(errors.MethodError, match=r"could drop inputs of\. Set dropout=0\.0"):
        veneer.attach(nn.Sequential(nn.MultiheadAttention(8, 2)), method, "*")


@pytest.mark.parametrize("method", [veneer.AdaLoRA(total_steps=9, initial_rank=2, target_rank=1, dropout=0.5),
                                    veneer.MiSS(rank=4, dropout=0.5), veneer.HiRA(rank=2, dropout=0.5)])  # fmt: skip
def test_dropout_acts_in_training_alone(method):
    model = linear().eval()
    perturb(veneer.attach(model, method, "0"))
    x = torch.randn(4, 12, dtype=torch.float64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_hira_is_measured_and_the_others_only_add():
    model = linear()
    veneer.attach(model, veneer.HiRA(rank=2), "0", name="hira")
    under = veneer.attach(model, veneer.LoRA(rank=2), "0", name="lora")
    with pytest.raises(errors.AdapterError, match="'hira' measures the weight of 0"):
        veneer.merge(model, under)


@pytest.mark.parametrize("method", [veneer.LoRA(rank=2, init="olora"), veneer.AdaLoRA(total_steps=9, initial_rank=2,
                                    target_rank=1)])  # fmt: skip
def test_arithmetic_takes_all_of_the_change(method):
    """What is added up is the change that acts: without the start of OLoRA, with the E of AdaLoRA."""
    model = linear()
    x = torch.randn(3, 12, dtype=torch.float64)
    perturb(veneer.attach(model, method, "0", name="one"))
    expected = model(x).detach()
    veneer.to_lora(model, "one", rank=4, name="plain")
    veneer.activate(model, "plain")
    torch.testing.assert_close(model(x), expected)
