"""PiSSA and OLoRA train as PEFT's do, which take the start out of the weight; our files are plain LoRA to PEFT."""

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

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
starts = pytest.mark.parametrize("init", ["pissa", "olora"])
TARGETS = ["q_proj", "v_proj", "down_proj"]
WHERE = "q_proj | v_proj | down_proj"


def pairs(adapter, theirs):
    """Our A and B with PEFT's."""
    found = dict(theirs.named_parameters())
    for claim in adapter.claims:
        for name in "AB":
            other = found[f"base_model.model.{claim.place.path}.lora_{name}.default.weight"]
            yield claim.delta.get_parameter(name), other


def close(one, two, within=1e-10):
    assert (one - two).abs().max() <= within * max(two.abs().max().item(), 1e-3)


@starts
@pytest.mark.parametrize("rslora", [False, True])
def test_the_start_and_the_training_are_those_of_peft(init, rslora):
    base, batch = FAMILIES["llama"].model().float(), FAMILIES["llama"].batch()  # PEFT starts in 32 bits at most
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, init_lora_weights=init, target_modules=TARGETS)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    ours = copy.deepcopy(base)
    adapter = veneer.attach(ours, veneer.LoRA(rank=4, alpha=6.0, use_rslora=rslora, init=init), WHERE)
    for mine, other in pairs(adapter, theirs):
        close(mine, other, 1e-5)
        mine.data.copy_(other.data)
    for claim in adapter.claims:
        claim.delta.A0.copy_(claim.delta.A.data)
        claim.delta.B0.copy_(claim.delta.B.data)
    plain = logits(base, batch)
    optimizers = [torch.optim.SGD(side, lr=1.0) for side in zip(*pairs(adapter, theirs), strict=True)]
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            logits(model, batch).pow(2).mean().backward()
            optimizer.step()
        for mine, other in pairs(adapter, theirs):
            close(mine.grad, other.grad, 1e-3)  # PEFT rounds W - s·B0·A0
            close(mine, other, 1e-4)
    changed = logits(ours, batch)
    assert (changed - plain).abs().max() > 1e-2
    close(changed, logits(theirs, batch), 1e-5)


@starts
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_reads_the_file_as_a_plain_lora_of_twice_the_rank(init, family, tmp_path):
    base, batch = FAMILIES[family].model(), FAMILIES[family].batch()
    ours = copy.deepcopy(base)
    adapter = veneer.attach(ours, veneer.LoRA(rank=3, alpha=6.0, init=init), "attention.q | attention.v")
    perturb(adapter, 0.1)
    veneer.save(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert (config["r"], config["lora_alpha"]) == ((6, 12) if family == "llama" else (12, 24))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    close(logits(theirs, batch), logits(ours, batch))
    (tmp_path / "veneer.json").unlink()
    other = copy.deepcopy(base)
    plain = veneer.load(other, tmp_path)
    assert not any("A0" in key for key in plain.state_dict())
    close(logits(other, batch), logits(ours, batch))


@starts
def test_files_whose_base_was_changed_are_refused(init, tmp_path):
    base = FAMILIES["llama"].model()
    theirs = peft.get_peft_model(base.float(), peft.LoraConfig(init_lora_weights=init, target_modules=TARGETS))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(veneer.errors.FileError, match=f"init_lora_weights='{init}', which changed base weights"):
        veneer.load(FAMILIES["llama"].model(), tmp_path)


@starts
@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning")
def test_peft_converts_a_folder_that_is_refused_into_one_that_loads(init, tmp_path):
    base, batch = FAMILIES["llama"].model().float(), FAMILIES["llama"].batch()
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, target_modules=TARGETS)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's page has it, for the start
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter += 0.3
    theirs.save_pretrained(tmp_path / "kept")
    with pytest.raises(veneer.errors.FileError, match="path_initial_model_for_weight_conversion="):
        veneer.load(copy.deepcopy(base), tmp_path / "kept")
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = copy.deepcopy(base)
    veneer.load(ours, tmp_path / "plain")
    assert (logits(ours, batch) - logits(base, batch)).abs().max() > 1e-2
    close(logits(ours, batch), logits(theirs, batch), 1e-5)
