"""TRL's SFTTrainer and DPOTrainer, as a user writes them, on models that carry adapters: they train, save, go on."""

from __future__ import annotations

import math

import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from test_train import byte_tokenizer, tiny

import veneer
from veneer.train.tasks import preference

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using the `tokenizers` backend:UserWarning"),
]
PAIRS = [{"prompt": f"thou {n}", "chosen": f" you {n}", "rejected": f" ye {n} {n}"} for n in range(24)]
ROWS = [{"prompt": f"thou {n}", "completion": f" you {n}"} for n in range(24)]


def adapted(base, **options):
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer)
    if base == "nf4":
        veneer.quantize(model, veneer.NF4())
    torch.manual_seed(1)
    return model, veneer.attach(model, veneer.LoRA(rank=2, **options)), tokenizer


def common(steps):
    return {
        "max_steps": steps, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True, "logging_steps": 1,
        "lr_scheduler_type": "constant",
    }  # fmt: skip


def supervised(folder, base, steps):
    model, adapter, tokenizer = adapted(base, dropout=0.1)
    arguments = trl.SFTConfig(str(folder), eos_token=tokenizer.eos_token, **common(steps))
    made = trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    return made, adapter


def preferring(folder, base, steps, **options):
    model, adapter, tokenizer = adapted(base, dropout=0.1)
    made = trl.DPOTrainer(
        model, veneer.train.Reference(model), trl.DPOConfig(str(folder), **common(steps), **options),
        train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer,
    )  # fmt: skip
    return made, adapter


@pytest.mark.parametrize("trainer", [supervised, preferring])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_it_trains_saves_adapters_alone_and_goes_on(base, trainer, tmp_path):
    whole, adapter = trainer(tmp_path / "whole", base, 4)
    frozen = {name: value.clone() for name, value in whole.model.state_dict().items() if ".adapters." not in name}
    start = [each.detach().clone() for each in adapter.parameters()]
    whole.train()
    assert all(not torch.equal(one, other) for one, other in zip(start, adapter.parameters(), strict=True))
    assert all(torch.equal(whole.model.state_dict()[name], value) for name, value in frozen.items())
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    assert saved
    assert all(".adapters." in name for name in saved)

    resumed, other = trainer(tmp_path / "whole", base, 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for one, two in zip(adapter.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_the_reference_is_the_model_with_no_adapter_active(base, precompute, tmp_path, monkeypatch):
    monkeypatch.setattr(trl.trainer.dpo_trainer, "create_model_from_path", lambda *a, **k: pytest.fail("a copy"))
    made, adapter = preferring(tmp_path, base, 1, precompute_ref_log_probs=precompute)
    for name, parameter in adapter.named_parameters():
        if name.endswith("B"):
            torch.nn.init.normal_(parameter, std=0.3)
    model = made.model.train()
    assert not list(made.ref_model.parameters())
    batch = made.data_collator([made.train_dataset[row] for row in range(4)])
    losses, gradients = [], []
    for loss in (made.compute_loss, preference.loss):
        model.zero_grad()
        losses.append(loss(model, batch))
        losses[-1].backward()
        gradients.append([parameter.grad.clone() for parameter in adapter.parameters()])
    torch.testing.assert_close(*losses)
    assert abs(losses[0].item() - math.log(2)) > 1e-3  # which it would be, were the reference the adapted model
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_loss_in_chunks_on_the_model_is_not_in_its_way(tmp_path):
    losses = []
    for chunked in (False, True):
        made, _ = supervised(tmp_path, "dense", 2)
        if chunked:
            veneer.chunk_loss(made.model)
        made.train()
        losses.append([row["loss"] for row in made.state.log_history if "loss" in row])
    assert losses[0] == losses[1]
