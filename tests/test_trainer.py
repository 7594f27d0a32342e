"""transformers' Trainer and an accelerate loop, as a user writes them, on models that carry adapters."""

import copy
import logging
import pickle
import re
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import veneer
from veneer.train import AdapterCallback, save_adapters_only

LORA = veneer.LoRA(rank=4, dropout=0.1)
ADALORA = veneer.AdaLoRA(total_steps=6, initial_rank=4, target_rank=2, warmup=1, final=2, orthogonality=5.0)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, row):
        ids = torch.randint(2, 60, (8,), generator=torch.Generator().manual_seed(row))
        return {"input_ids": ids, "labels": ids}


def dense(folder):
    return tiny.llama()


def own_nf4(folder):
    return veneer.quantize(tiny.llama(), veneer.NF4())


def bitsandbytes(folder):
    tiny.llama().save_pretrained(folder / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # its packing for inference loses gradients
    return model


def mixtral(folder):
    return tiny.mixtral()


BASES = {
    "dense": (dense, LORA),
    "nf4": (own_nf4, LORA),
    "bitsandbytes": (bitsandbytes, LORA),
    "experts": (mixtral, {"*experts*": veneer.LoRA(rank=2), "attention.q": LORA}),
    "whole": (dense, {"linear": LORA, "norm": veneer.LayerNormTuning()}),
}


def train(base, method, output, *, resume=None, callback=False, change=lambda model: None, **options):
    torch.manual_seed(0)
    model = base(output.parent)
    adapter = veneer.attach(model, method)
    change(model)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **options}
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        **options,
    )
    callbacks = [AdapterCallback(adapter)] if callback else []
    trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, adapter


def same(one, other):
    tensors = one.state_dict(), other.state_dict()
    return all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())


@pytest.mark.parametrize("kind", BASES)
def test_a_plain_trainer_saves_adapters_alone_and_goes_on_bit_for_bit(tmp_path, kind):
    base, method = BASES[kind]
    trainer, whole = train(base, method, tmp_path / "one")
    saved = load_file(tmp_path / "one" / "checkpoint-3" / "model.safetensors")
    assert saved.keys() == {key for key in trainer.model.state_dict() if ".adapters." in key}
    _, resumed = train(base, method, tmp_path / "two", resume=tmp_path / "one" / "checkpoint-3")
    assert same(whole, resumed)
    _, half = train(base, method, tmp_path / "three", max_steps=3)
    assert not same(whole, half)


def test_resuming_a_dense_base_says_nothing_of_missing_weights(tmp_path, caplog):
    train(dense, LORA, tmp_path / "one")
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        train(dense, LORA, tmp_path / "two", resume=tmp_path / "one" / "checkpoint-3")
    assert "missing" not in caplog.text
    assert "unexpected" not in caplog.text


def test_the_best_checkpoint_comes_back_at_the_end(tmp_path):
    _, last = train(dense, LORA, tmp_path / "one", eval_strategy="steps", eval_steps=3)
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}  # the worst, so that the first is best
    trainer, adapter = train(dense, LORA, tmp_path / "two", **options)
    assert trainer.state.best_global_step == 3
    assert not same(adapter, last)
    saved = load_file(tmp_path / "two" / "checkpoint-3" / "model.safetensors")
    state = trainer.model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in saved.items())


def test_a_head_that_trains_beside_the_adapter_is_in_the_checkpoint(tmp_path):
    trainer, _ = train(dense, LORA, tmp_path / "one", change=lambda model: model.lm_head.requires_grad_(True))
    saved = load_file(tmp_path / "one" / "checkpoint-6" / "model.safetensors")
    assert {key for key in saved if ".adapters." not in key} == {"lm_head.weight"}
    assert torch.equal(saved["lm_head.weight"], trainer.model.lm_head.weight)


def test_running_statistics_are_in_the_checkpoint():
    model = tiny.vit()
    model.vit.layernorm = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.BatchNorm1d(5))
    veneer.attach(model, LORA, "attention")
    kept = model.state_dict().keys() - set(model._keys_to_ignore_on_save)
    assert {key for key in kept if ".adapters." not in key} == {
        f"vit.layernorm.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


def test_the_marks_go_with_the_adapter_and_a_merged_model_is_saved_whole(tmp_path):
    model = tiny.mixtral()
    before = {name: copy.copy(vars(model)[name]) for name in vars(model) if "ignore" in name or "conversion" in name}
    one, two = veneer.attach(model, LORA, name="one"), veneer.attach(model, LORA, name="two")
    tiny.perturb(one)
    assert len(model._keys_to_ignore_on_save) == len(list(model._keys_to_ignore_on_save)) > 0
    assert "lm_head.weight" in model._keys_to_ignore_on_save
    assert "nothing" not in model._keys_to_ignore_on_save
    veneer.merge(model, one)
    assert set(model._keys_to_ignore_on_save) == set()
    model.save_pretrained(tmp_path)
    assert any("block_sparse_moe.experts" in key for key in load_file(tmp_path / "model.safetensors"))
    veneer.unmerge(model, one)
    assert "lm_head.weight" in model._keys_to_ignore_on_save
    veneer.detach(model, one)
    assert "lm_head.weight" in model._keys_to_ignore_on_save
    veneer.detach(model, two)
    assert {n: vars(model)[n] for n in vars(model) if "ignore" in n or "conversion" in n} == before


def test_copies_carry_marks_of_their_own():
    model = tiny.llama()
    veneer.attach(model, LORA)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert set(other._keys_to_ignore_on_save) == set(model._keys_to_ignore_on_save)
        veneer.detach(other, "default")
        assert other._keys_to_ignore_on_save == set()
    assert model._keys_to_ignore_on_save


def test_a_quantized_base_counts_as_one_again_after_detaching(tmp_path):
    model = bitsandbytes(tmp_path)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments)
    adapter = veneer.attach(model, LORA)
    Trainer(model, arguments)
    veneer.detach(model, adapter)
    assert model.is_quantized
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments)


def test_the_callback_gives_a_budget_its_schedule_and_its_term_and_both_go_on(tmp_path):
    _, whole = train(dense, ADALORA, tmp_path / "one", callback=True)
    assert sum(int((claim.delta.E != 0).sum()) for claim in whole.claims) == 2 * len(whole.claims)
    for step in (3, 5):  # before the budget is final, and after
        _, cut = train(dense, ADALORA, tmp_path / f"to {step}", callback=True, save_steps=step)
        assert same(whole, cut)
        checkpoint = tmp_path / f"to {step}" / f"checkpoint-{step}"
        _, resumed = train(dense, ADALORA, tmp_path / f"from {step}", callback=True, resume=checkpoint)
        assert same(whole, resumed), step
    _, without = train(dense, ADALORA, tmp_path / "without")
    assert sum(int((claim.delta.E != 0).sum()) for claim in without.claims) == 4 * len(without.claims)
    off = [
        sum((d.A @ d.A.T - torch.eye(4)).norm().item() for d in (c.delta for c in a.claims)) for a in (whole, without)
    ]
    assert off[0] < off[1]
    veneer.save(whole, tmp_path / "saved")
    assert not any("passing" in key for key in whole.state_dict())


@pytest.mark.parametrize("steps", [1, 2], ids=["one batch a step", "two batches a step"])
def test_the_callback_adds_the_gradient_that_the_term_in_the_loss_has(tmp_path, steps):
    model = tiny.llama().double()
    for name in ("one", "two"):
        veneer.attach(model, veneer.BottleneckAdapter(width=4), name=name)
    fusion = veneer.fuse(model, ["one", "two"], method=veneer.AdapterFusion(regularization=3.0))
    tiny.perturb(fusion)
    other = copy.deepcopy(model)
    twin = veneer.adapters(other)[fusion.name]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=steps,
        report_to="none", use_cpu=True, disable_tqdm=True, optim="sgd", learning_rate=0.1, max_grad_norm=0.05,
        lr_scheduler_type="constant", save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [Rows()[row] for row in range(4)] * steps
    Trainer(model, arguments, train_dataset=rows, callbacks=[AdapterCallback(fusion)]).train()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    other.train()
    (other(**batch).loss + twin.regularization()).backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
    for (key, mine), theirs in zip(fusion.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine, theirs - 0.1 * theirs.grad, rtol=1e-4, atol=1e-8, msg=key)


@pytest.mark.parametrize("method", [LORA, ADALORA], ids=["LoRA", "AdaLoRA"])
def test_the_loop_of_the_documentation_trains(method, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"## A loop of your own.*?```python\n(.*?)```", page, flags=re.DOTALL)
    assert loop.count("\n") <= 12
    model, losses = tiny.llama().train(), []
    rows = [Rows()[row] for row in range(4)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    model.register_forward_hook(lambda module, args, output: losses.append(output.loss.detach()))
    names = {
        "veneer": veneer,
        "torch": torch,
        "model": model,
        "batches": [batch] * 6,
        "folder": tmp_path / "mine",
        "method": method,
    }
    assert "veneer.LoRA(rank=8)" in loop
    exec(loop.replace("veneer.LoRA(rank=8)", "method"), names)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert veneer.load(tiny.llama(), tmp_path / "mine").parameters()


def test_an_accelerate_loop_goes_on_bit_for_bit(tmp_path):
    def loop(steps, save=None, load=None):
        torch.manual_seed(0)
        model = tiny.llama()
        adapter = veneer.attach(model, LORA)
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        save_adapters_only(accelerator)
        if load:
            accelerator.load_state(load)
        model.train()
        for step in range(steps[0], steps[1]):
            ids = torch.stack([Rows()[row]["input_ids"] for row in range(4 * step, 4 * step + 4)])
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
        if save:
            accelerator.save_state(save)
        return adapter

    whole = loop((0, 4))
    loop((0, 2), save=str(tmp_path))
    assert all(".adapters." in key for key in load_file(tmp_path / "model.safetensors"))
    assert same(whole, loop((2, 4), load=str(tmp_path)))
