"""training.compile: the same losses, one graph for all blocks of a kind and all lengths, and no trace left."""

from __future__ import annotations

import functools
import io
import shutil

import pytest
import small_run
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_train import byte_tokenizer, tiny
from torch import nn

import veneer
from veneer.errors import RecipeError
from veneer.train.compiling import CompiledBlocks, refuse_without_compiler
from veneer.train.labels import IGNORED

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo looks
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),  # Inductor does
]
COMPILE = "training.compile=true"
SAME = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return small_run.make(tmp_path_factory.mktemp("small"))


@pytest.fixture
def quickly(monkeypatch):
    """Graphs as they were captured, without machine code, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def go(recipe, output, *overrides, resume=False):
    return veneer.train(
        recipe,
        [f"output={output}", "method={LoRA: {}}", *overrides],
        resume=resume,
        console=Console(file=io.StringIO()),
    )


def losses(result):
    return [row["loss"] for row in result.report["log"] if "loss" in row]


def batch(rows, length):
    """Random tokens, of which the first row has two fewer."""
    ids = torch.randint(0, 200, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = torch.where(mask.bool(), ids, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def gradients(model, given):
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.detach(), [each.grad.clone() for each in model.parameters() if each.requires_grad]


@pytest.mark.parametrize(
    "method",
    [
        veneer.LoRA(rank=2),
        *(
            pytest.param(method, marks=pytest.mark.slow)
            for method in (veneer.BottleneckAdapter(width=2), veneer.DoRA())
        ),
    ],
    ids=lambda method: type(method).__name__,
)
@pytest.mark.usefixtures("quickly")
def test_graphs_serve_all_blocks_and_lengths(method):
    model = tiny(byte_tokenizer())
    keys = model.state_dict().keys()
    veneer.attach(model, method)
    model.train()
    with veneer.chunk_loss(model):
        blocks = CompiledBlocks(model)
        for number, (rows, length) in enumerate([(4, 11), (4, 17), (3, 9), (5, 40), (2, 23)], 1):
            plain, wanted = gradients(model, batch(rows, length))
            with blocks.step(number):
                loss, found = gradients(model, batch(rows, length))
            torch.testing.assert_close(loss, plain, **SAME)
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, **SAME)
    assert blocks.steps == [1]
    assert blocks.graphs == 2, "the lowest block, whose input has no gradient, and the others"
    assert all(block._compiled_call_impl is None for block in blocks.blocks)
    assert keys <= model.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["training.gradient_checkpointing=true"],
        ["data.packing=true", "data.max_length=64"],
        ["model.quantization=nf4"],
        ["method={LoRA: {where: model.layers.1.*_proj}}", "training.cache_frozen=true", "training.steps=20"],
        ["data=preferences.jsonl"],
    ],
    ids=["recomputed", "packed", "nf4", "kept", "preferences"],
)
@pytest.mark.usefixtures("quickly")
def test_a_compiled_run_is_the_same_run(recipe, tmp_path, overrides):
    plain = go(recipe, tmp_path / "plain", *overrides)
    compiled = go(recipe, tmp_path / "compiled", *overrides, COMPILE)
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)
    assert plain.report["compiled"] is None
    assert compiled.report["compiled"]["at_steps"][0] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
def test_a_compiled_run_goes_on_to_the_bit_also_with_dropout(recipe, tmp_path):
    often = ["method={LoRA: {dropout: 0.1}}", COMPILE, "training.checkpoint_every=3", "training.keep_checkpoints=9"]
    undisturbed = go(recipe, tmp_path / "one", *often)
    shutil.copytree(undisturbed.folder, tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "adapter")
    (tmp_path / "two" / "report.json").unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "checkpoint-6")
    resumed = go(recipe, tmp_path / "two", *often, resume=True)
    one, two = (load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (undisturbed, resumed))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_machine_code_trains_as_eager_code(recipe, tmp_path):
    overrides = ["training.steps=30", "training.epochs=null"]
    plain = go(recipe, tmp_path / "plain", *overrides)
    compiled = go(recipe, tmp_path / "compiled", *overrides, COMPILE)
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)
    made = compiled.report["compiled"]
    assert made["graphs"] <= 6, "with a mask, without one, and of one row; in the lowest block and in others"
    assert max(made["at_steps"]) <= 15, "none in the second epoch"


def test_without_a_compiler_one_sentence_says_so(recipe, tmp_path):
    import torch._inductor.config as inductor

    refuse_without_compiler()
    missing = inductor.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(RecipeError, match=r"^training.compile needs a C\+\+ compiler, and neither .*") as said:
        go(recipe, tmp_path / "out", COMPILE)
    assert len(str(said.value).splitlines()) == 1


def test_a_model_without_blocks_is_refused():
    with pytest.raises(RecipeError, match=r"training.compile: Linear has no blocks of transformers'. Leave it out"):
        CompiledBlocks(nn.Linear(2, 2))


@pytest.mark.usefixtures("quickly")
def test_a_block_with_an_adapter_and_one_without_have_graphs_of_their_own():
    model = tiny(byte_tokenizer())
    adapter = veneer.attach(model, veneer.LoRA(rank=2), "model.layers.1.*_proj")
    for name, each in adapter.named_parameters():
        nn.init.normal_(each, std=0.3) if name.endswith("B") else None
    plain, _ = gradients(model, batch(3, 9))
    blocks = CompiledBlocks(model)
    with blocks.step(1):
        loss, _ = gradients(model, batch(3, 9))
    torch.testing.assert_close(loss, plain, **SAME)
    assert blocks.graphs == 2


@pytest.mark.usefixtures("quickly")
def test_blocks_that_are_no_single_graph_are_refused():
    model = tiny(byte_tokenizer())
    model.model.layers[1].mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    blocks = CompiledBlocks(model)
    words = r"the blocks of this LlamaForCausalLM .* are not one graph \(.*\)\. Leave it out"
    with pytest.raises(RecipeError, match=words), blocks.step(1):
        gradients(model, batch(2, 9))
    assert all(block._compiled_call_impl is None for block in blocks.blocks)
