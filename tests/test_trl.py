"""TRL's SFTTrainer, as a user writes it, on models that carry adapters: it trains them, saves them alone, resumes."""

from __future__ import annotations

import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from test_train import byte_tokenizer, tiny

import veneer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using the `tokenizers` backend:UserWarning"),
]
ROWS = [{"prompt": f"thou {n}", "completion": f" you {n}"} for n in range(24)]


def trainer(folder, base, steps):
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer)
    if base == "nf4":
        veneer.quantize(model, veneer.NF4())
    torch.manual_seed(1)
    adapter = veneer.attach(model, veneer.LoRA(rank=2, dropout=0.1))
    arguments = trl.SFTConfig(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
        logging_steps=1, eos_token=tokenizer.eos_token,
    )  # fmt: skip
    made = trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    return made, adapter


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_it_trains_saves_adapters_alone_and_goes_on(base, tmp_path):
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


def test_a_loss_in_chunks_on_the_model_is_not_in_its_way(tmp_path):
    losses = []
    for chunked in (False, True):
        made, _ = trainer(tmp_path, "dense", 2)
        if chunked:
            veneer.chunk_loss(made.model)
        made.train()
        losses.append([row["loss"] for row in made.state.log_history if "loss" in row])
    assert losses[0] == losses[1]
