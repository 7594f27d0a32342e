"""The blocks below the lowest adapter: nothing goes back through them, and what they compute can be kept."""

from __future__ import annotations

import errno
import io
import os

import pytest
import small_run
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer.errors import RecipeError, RunError

UPPER = ["method={LoRA: {where: model.layers.1.*_proj}}", "training.steps=40", "evaluation.every=20"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return small_run.make(tmp_path_factory.mktemp("small"))


def go(recipe, output, *overrides):
    said = io.StringIO()
    result = veneer.train(recipe, [f"output={output}", *overrides], console=Console(file=said, width=300))
    weights = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    losses = [row["loss"] for row in result.report["log"] if "loss" in row]
    return result, weights, losses, said.getvalue()


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_with_kept_activations_is_the_same_run(packing, recipe, tmp_path, monkeypatch):
    calls = []
    inner = LlamaForCausalLM.__init__

    def counted(self, *args, **kwargs):
        inner(self, *args, **kwargs)
        self.model.layers[0].mlp.register_forward_hook(lambda module, *_: calls.append(module.training))

    monkeypatch.setattr(LlamaForCausalLM, "__init__", counted)
    overrides = [*UPPER, f"data.packing={str(packing).lower()}", "data.max_length=64"]
    _, plain, losses, _ = go(recipe, tmp_path / "plain", *overrides)
    whole, before = sum(calls), len(calls)
    _, kept, kept_losses, said = go(recipe, tmp_path / "kept", *overrides, "training.cache_frozen=true")
    assert sum(calls[before:]) < 0.6 * whole  # the frozen block ran in the first epoch, and not after
    assert "What the 1 frozen blocks compute is kept on disk" in said
    assert kept_losses == pytest.approx(losses, rel=1e-6)
    for name, value in plain.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-5, atol=1e-6)
    assert not [path for path in (tmp_path / "kept").iterdir() if path.name.startswith("tmp")]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.LoRA.where=linear"], "no block lies below the lowest that trains"),
        (["training.steps=10"], "10 steps of 4 see none of 57 rows twice"),
        (["data.streaming=true"], "training.cache_frozen needs rows that come again"),
        (["model={folder}/t5", "data={folder}/pairs.jsonl", "method.LoRA.where=decoder.block.1.*"],
         "T5ForConditionalGeneration is not one stack of blocks"),
        (["model={folder}/dropping"], "the 1 frozen blocks compute something else each time"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(overrides, said, recipe, tmp_path):
    folder = recipe.parent
    if not (folder / "dropping").exists():
        model = LlamaForCausalLM.from_pretrained(folder / "model")
        model.config.attention_dropout = 0.2
        model.save_pretrained(folder / "dropping")
        small_run.byte_tokenizer().save_pretrained(folder / "dropping")
    with pytest.raises(RecipeError, match=said):
        go(recipe, tmp_path / "out", *UPPER, "training.cache_frozen=true",
           *(one.replace("{folder}", str(folder)) for one in overrides))  # fmt: skip


def test_a_full_disk_is_said_before_anything_is_trained(recipe, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"training\.cache_frozen needs .* MB in .*: No space left on device"):
        go(recipe, tmp_path / "out", *UPPER, "training.cache_frozen=true")


def test_nothing_goes_back_below_the_lowest_adapter():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).train()
    veneer.attach(model, veneer.LoRA(rank=2), where="model.layers.2.*_proj")
    outputs = []
    for block in model.model.layers:
        block.register_forward_hook(lambda block, args, output: outputs.append(output))
    saved = []
    pack = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(len(outputs)) or x, lambda x: x)
    ids = torch.randint(61, (2, 5))
    with pack:
        loss = model(input_ids=ids, labels=ids).loss
    assert [output.requires_grad for output in outputs] == [False, False, True]
    assert min(saved) == 2  # no tensor is kept before the second block is done
    loss.backward()


@pytest.mark.parametrize(("asked", "found"), [("auto", "chunked"), ("chunked", "chunked"), ("whole", "whole: as")])
def test_a_recipe_says_how_its_loss_is_computed(asked, found, recipe, tmp_path):
    result, *_ = go(recipe, tmp_path / "out", f"training.loss={asked}")
    assert result.report["loss"].startswith(found)
    assert "_loss_function" not in vars(result.model)
    assert yaml.safe_load((result.folder / "recipe.yaml").read_text())["training"]["loss"] == asked


def test_a_loss_in_chunks_changes_no_figures_and_is_refused_where_it_is_not_the_models(recipe, tmp_path):
    whole, chunked = (go(recipe, tmp_path / loss, f"training.loss={loss}") for loss in ("whole", "chunked"))
    assert whole[2] == pytest.approx(chunked[2], rel=1e-5)
    assert whole[0].metrics == pytest.approx(chunked[0].metrics, rel=1e-5)
    t5 = [f"model={recipe.parent}/t5", f"data={recipe.parent}/pairs.jsonl"]
    assert "computes its loss in its own forward" in go(recipe, tmp_path / "t5", *t5)[0].report["loss"]
    with pytest.raises(RecipeError, match=r"training\.loss: T5ForConditionalGeneration computes its loss"):
        go(recipe, tmp_path / "other", *t5, "training.loss=chunked")
