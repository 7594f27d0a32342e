"""AdaLoRA, MiSS, HiRA, SHiRA and LoHa compute what Hugging Face PEFT's do, and either reads the other's files."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from tiny import FAMILIES, logits, perturb

import veneer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # of PEFT's SHiRA
    pytest.mark.filterwarnings("ignore:One of the base layers adapted with ShiRA:UserWarning"),
]

TARGETS = ["q_proj", "v_proj", "down_proj"]
WHERE = "q_proj | v_proj | down_proj"
ADALORA = {"total_step": 20, "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 5, "deltaT": 2, "lora_alpha": 6}
OURS = {"total_steps": 20, "initial_rank": 4, "target_rank": 2, "warmup": 2, "final": 5, "interval": 2, "alpha": 6.0}
CASES = {
    "AdaLoRA": (lambda **more: peft.AdaLoraConfig(**ADALORA, **more), veneer.AdaLoRA(**OURS)),
    "MiSS": (lambda **more: peft.MissConfig(r=5, **more), veneer.MiSS(rank=5)),
    "MiSS-mini": (
        lambda **more: peft.MissConfig(r=8, mini_r=4, init_weights="mini", **more),
        veneer.MiSS(rank=8, mini_rank=4),
    ),
    "LoHa": (lambda **more: peft.LoHaConfig(r=3, alpha=6, **more), veneer.LoHa(rank=3, alpha=6.0)),
    "HiRA": (lambda **more: peft.HiraConfig(r=4, **more), veneer.HiRA(rank=4)),
    "SHiRA": (lambda **more: peft.ShiraConfig(r=2, random_seed=3, **more), veneer.SHiRA(rank=2, seed=3)),
}
cases = pytest.mark.parametrize("name", CASES)
dtypes = pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)


def trained(model):
    """What PEFT trains and saves; it trains AdaLoRA's `ranknum` too (seen in 0.21.2), and then does not save it."""
    return [p for name, p in model.named_parameters() if p.requires_grad and ".ranknum." not in name]


def theirs_on(base, name, **more):
    """PEFT's adapter on a copy, with values that are not its start."""
    torch.manual_seed(5)
    model = peft.get_peft_model(copy.deepcopy(base), CASES[name][0](target_modules=TARGETS, **more)).eval()
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def backward(model, batch):
    answer = logits(model, batch)
    answer.pow(2).mean().backward()
    return answer.detach()


def close(ours, theirs, within, floor=0.0):
    assert (ours - theirs).abs().max() <= within * max(theirs.abs().max().item(), floor)


def same(ours, adapter, theirs, base, within):
    batch = FAMILIES["llama"].batch()
    expected = backward(theirs, batch)
    assert (expected - logits(base, batch)).abs().max() > 1e-3, "the adapter changes nothing"
    close(backward(ours, batch), expected, within)
    own = sorted((p.grad for p in adapter.parameters()), key=lambda g: (g.shape, g.abs().sum().item()))
    other = [p.grad for p in trained(theirs)]
    other = sorted(other, key=lambda g: (g.shape, g.abs().sum().item()))
    assert [g.shape for g in own] == [g.shape for g in other]
    for one, two in zip(own, other, strict=True):
        assert two.abs().max() > 0
        close(one, two, within, floor=1e-3)


@dtypes
@cases
def test_veneer_reads_what_peft_wrote(name, dtype, within, tmp_path):
    base = FAMILIES["llama"].model().to(dtype)
    theirs = theirs_on(base, name)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    adapter = veneer.load(ours, tmp_path)
    assert {type(claim.method).__name__ for claim in adapter.claims} == {name.removesuffix("-mini")}
    same(ours, adapter, theirs, base, within)


@dtypes
@cases
def test_peft_reads_what_veneer_wrote(name, dtype, within, tmp_path):
    base = FAMILIES["llama"].model().to(dtype)
    ours = copy.deepcopy(base)
    adapter = veneer.attach(ours, CASES[name][1], WHERE)
    perturb(adapter, 0.1)
    veneer.save(adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).eval()
    same(ours, adapter, theirs, base, within)


@cases
def test_a_head_trained_whole_goes_both_ways(name, tmp_path):
    base = FAMILIES["llama"].model()
    theirs = theirs_on(base, name, modules_to_save=["lm_head"])
    theirs.save_pretrained(tmp_path / "peft")
    ours = copy.deepcopy(base)
    veneer.save(veneer.load(ours, tmp_path / "peft"), tmp_path / "veneer")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "veneer").eval()
    batch = FAMILIES["llama"].batch()
    with torch.no_grad():
        assert torch.equal(logits(again, batch), logits(theirs, batch))
        close(logits(ours, batch), logits(theirs, batch), 1e-10)


@cases
def test_what_is_foreign_in_a_config_is_refused_by_name(name, tmp_path):
    theirs_on(FAMILIES["llama"].model(), name).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bias": "all", "use_magic": True}))
    with pytest.raises(veneer.errors.FileError, match="uses use_magic, which Veneer does not have"):
        veneer.load(FAMILIES["llama"].model(), tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_magic": False}))
    with pytest.raises(veneer.errors.FileError, match="it has bias='all', which Veneer does not have"):
        veneer.load(FAMILIES["llama"].model(), tmp_path)


@cases
def test_roles_of_a_fused_projection_are_no_peft_file(name, tmp_path):
    model = FAMILIES["gpt2"].model()
    veneer.save(veneer.attach(model, CASES[name][1], "attention.q"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["veneer.json", "veneer.safetensors"]


@pytest.fixture
def schedules():
    """Both libraries' AdaLoRA with the same values, trained one step at a time on the same batch."""
    base = FAMILIES["llama"].model()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), CASES["AdaLoRA"][0](target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    # without a task_type PEFT's forward goes round its orthogonality term (seen in 0.21.2)
    ours = copy.deepcopy(base)
    adapter = veneer.attach(ours, CASES["AdaLoRA"][1], WHERE)
    found = dict(theirs.named_parameters())
    pairs = []
    for claim in adapter.claims:
        for name, parameter in claim.delta.named_parameters():
            other = found[f"base_model.model.{claim.place.path}.lora_{name}.default"]
            other.data.copy_(parameter.data)
            pairs.append((parameter, other))
    return ours, adapter, theirs, pairs


def test_the_loss_and_the_schedule_are_those_of_peft(schedules):
    ours, adapter, theirs, pairs = schedules
    batch = FAMILIES["llama"].batch()
    optimizers = [torch.optim.SGD(params, lr=0.5) for params in zip(*pairs, strict=True)]
    left = []
    for step in range(1, 21):
        batch["labels"] = batch["input_ids"].roll(step, 0)
        losses = [ours(**batch).loss + adapter.regularization(), theirs(**batch).loss]
        close(losses[0], losses[1], 1e-6)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
        adapter.after_step(step)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for parameter, other in pairs:
            close(parameter, other, 1e-5, floor=1e-2)
        left.append(sum(int((claim.delta.E != 0).sum()) for claim in adapter.claims))
    cuts = left[3:15:2]
    assert left[:2] == [24, 24]
    assert cuts == sorted(cuts, reverse=True)
    assert left[4] > left[3], "what was cut may come back until the next cut"
    assert left[-6:] == [12] * 6, "target_rank 2 at 6 places"
    assert len({int((claim.delta.E != 0).sum()) for claim in adapter.claims}) > 1, "all layers kept the same"


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT warns of a layer that keeps no triplet at all
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # and of AdaLoRA's own keys
def test_a_rank_pattern_goes_both_ways(schedules, tmp_path):
    theirs = schedules[2]
    batch = FAMILIES["llama"].batch()
    optimizer = torch.optim.SGD(trained(theirs), lr=0.5)
    for step in range(1, 18):
        backward(theirs, batch)
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    expected = logits(theirs.eval(), batch)
    theirs.save_pretrained(tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["rank_pattern"]
    model = FAMILIES["llama"].model()
    loaded = veneer.load(model, tmp_path / "peft")
    ranks = [claim.delta.rank for claim in loaded.claims]
    assert sum(ranks) == 12
    assert len(set(ranks)) > 1
    close(logits(model, batch), expected, 1e-10)
    veneer.save(loaded, tmp_path / "veneer")
    again = peft.PeftModel.from_pretrained(FAMILIES["llama"].model(), tmp_path / "veneer").eval()
    close(logits(again, batch), expected, 1e-10)
    reloaded = veneer.load(FAMILIES["llama"].model(), tmp_path / "veneer")
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, reloaded.state_dict()[key]), key


def test_other_indices_than_a_weight_has_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs_on(FAMILIES["llama"].model(), "SHiRA").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("q_proj.shira_indices"))
    tensors[key][1, 5] = 32
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(veneer.errors.CorruptFile, match=r"q_proj has indices outside its weight of shape \(32, 32\)"):
        veneer.load(FAMILIES["llama"].model(), tmp_path)
    tensors[key] = tensors[key].float()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(veneer.errors.CorruptFile, match=r"stored as torch\.float32, where an adapter has torch\.int32"):
        veneer.load(FAMILIES["llama"].model(), tmp_path)


def test_one_seed_chooses_the_same_entries_as_peft():
    base = FAMILIES["llama"].model()
    theirs = theirs_on(base, "SHiRA")
    adapter = veneer.attach(copy.deepcopy(base), CASES["SHiRA"][1], WHERE)
    for claim in adapter.claims:
        layer = theirs.get_submodule(f"base_model.model.{claim.place.path}")
        assert torch.equal(claim.delta.indices, layer.shira_indices["default"])


def test_a_bat_is_refused(tmp_path):
    config = peft.MissConfig(r=8, init_weights="bat", target_modules=["q_proj"])
    peft.get_peft_model(FAMILIES["llama"].model(), config).save_pretrained(tmp_path)
    with pytest.raises(veneer.errors.FileError, match="it has init_weights='bat', which Veneer does not have"):
        veneer.load(FAMILIES["llama"].model(), tmp_path)
