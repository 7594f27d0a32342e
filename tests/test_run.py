"""Runs of recipes: repeated, resumed, stopped, out of memory, diverged, damaged, and on a full disk."""

import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small_run
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import veneer
from veneer.errors import Diverged, MissingSample, RecipeError, RunError, Stopped
from veneer.train import checkpoint, run, using
from veneer.train import recipe as recipes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return small_run.make(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """An undisturbed run."""
    return go(recipe, tmp_path_factory.mktemp("whole") / "out")


def go(recipe, output, *overrides, resume=False, lines=None):
    console = Console(file=io.StringIO() if lines is None else lines, width=300)
    return veneer.train(recipe, [f"output={output}", *overrides], resume=resume, console=console)


def weights(result):
    folder = result.folder if isinstance(result, run.Result) else Path(result)
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- what a run leaves


def test_a_run_leaves_what_it_says(whole):
    there = {path.name for path in whole.folder.iterdir() if not path.name.startswith(".")}
    assert there == {"adapter", "checkpoints", "curve.png", "recipe.yaml", "report.json"}
    assert checkpoint.steps(whole.folder / "checkpoints") == [4, 6]
    kept = {path.name for path in (whole.folder / "checkpoints" / "checkpoint-6").iterdir()}
    assert kept == {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "checksums.json",
    }
    saved = load_file(whole.folder / "checkpoints" / "checkpoint-6" / "model.safetensors")
    assert all(".adapters." in key for key in saved)
    report = json.loads((whole.folder / "report.json").read_text())
    assert report["metrics"] == whole.metrics
    assert report["metrics"]["loss"] < report["before"]["loss"]
    assert report["metrics"]["perplexity"] == pytest.approx(math.exp(report["metrics"]["loss"]))
    assert [entry["step"] for entry in report["log"] if "loss" in entry] == list(range(1, 7))
    assert [entry["step"] for entry in report["log"] if "eval_loss" in entry] == [3, 6]


def test_the_saved_recipe_repeats_the_run(whole, tmp_path):
    record = recipes.load(whole.folder / "adapter" / "recipe.yaml").record
    assert record.versions["torch"] == torch.__version__
    assert record.steps == 6
    again = go(whole.folder / "adapter" / "recipe.yaml", tmp_path / "again")
    assert same(whole, again)
    assert again.metrics == whole.metrics


def test_other_data_under_a_saved_recipe_are_refused(recipe, whole, tmp_path):
    other = tmp_path / "other.jsonl"
    small_run.write(other, ({"prompt": f"thou {n}", "completion": "me"} for n in range(60)))
    with pytest.raises(RunError, match="fingerprint differs"):
        go(whole.folder / "recipe.yaml", tmp_path / "out", f"data.path={other}")


def test_an_adapter_is_measured_and_answers_again(whole):
    base, adapted = using.compare(whole.folder / "adapter", [])
    assert adapted == pytest.approx(whole.metrics)
    assert base == pytest.approx(whole.before)
    assert len(using.answer(whole.folder / "adapter", ["thou 3", "thou 4"], 4)) == 2


@pytest.mark.parametrize(
    ("model", "data", "task", "figures"),
    [
        ("bert", "classes", "sequence_classification", {"loss", "accuracy", "f1"}),
        ("bert", "numbers", "regression", {"loss", "mean_absolute_error"}),
        ("t5", "pairs", "seq2seq", {"loss", "perplexity"}),
    ],
)
def test_every_task_trains(recipe, tmp_path, model, data, task, figures):
    folder = recipe.parent
    output = tmp_path / "out"
    overrides = [f"model={folder / model}", f"data.path={folder / data}.jsonl", "training.steps=12"]
    result = go(recipe, output, *overrides)
    assert result.recipe.record.task == task
    assert result.metrics.keys() == figures
    assert result.metrics["loss"] < result.before["loss"]
    assert using.compare(output / "adapter", [])[1] == pytest.approx(result.metrics, rel=1e-4)
    assert bool(result.adapter.also_train) == (model == "bert")  # a head that the files do not have


# --- going on


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.micro_batch_size=2", "training.steps=20", "training.checkpoint_every=7"],
        ["method={AdaLoRA: {total_steps: 6, final: 1}}", "evaluation.keep=best"],
    ],
    ids=["one epoch", "accumulated, two epochs", "a budget"],
)
def test_a_stopped_run_goes_on_to_the_bit(recipe, tmp_path, monkeypatch, overrides):
    undisturbed = go(recipe, tmp_path / "one", *overrides)

    class Stop(run.Signals):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            super().on_step_end(args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run, "Signals", Stop)
        with pytest.raises(Stopped, match=r"Stopped by SIGTERM after step 5 of .*veneer train .*recipe.yaml --resume"):
            go(recipe, tmp_path / "two", *overrides)
    assert checkpoint.steps(tmp_path / "two" / "checkpoints")[-1] == 5
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(RunError, match=r"holds checkpoints of a run\. Go on with --resume"):
        go(recipe, tmp_path / "two", *overrides)
    with pytest.raises(RunError, match=r"another recipe: training.seed differ"):
        go(recipe, tmp_path / "two", *overrides, "training.seed=5", resume=True)
    resumed = go(recipe, tmp_path / "two", *overrides, resume=True)
    if "method" in str(overrides):
        same_tensors = zip(
            undisturbed.adapter.state_dict().values(), resumed.adapter.state_dict().values(), strict=True
        )
        assert all(torch.equal(one, other) for one, other in same_tensors)
    else:
        assert same(undisturbed, resumed)
    assert resumed.metrics == undisturbed.metrics
    with pytest.raises(RunError, match="holds a finished run"):
        go(recipe, tmp_path / "two", *overrides)


def test_a_run_goes_on_to_the_bit_from_the_middle_of_a_later_epoch(recipe, tmp_path):
    """Where the order of the rows is drawn anew, and the dropout of the epochs before has moved all random states."""
    often = ["training.steps=20", "training.checkpoint_every=3", "training.keep_checkpoints=9"]
    undisturbed = go(recipe, tmp_path / "one", *often)
    shutil.copytree(undisturbed.folder, tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "adapter")
    (tmp_path / "two" / "report.json").unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "checkpoint-20")
    assert checkpoint.steps(tmp_path / "two" / "checkpoints")[-1] == 18
    assert same(undisturbed, go(recipe, tmp_path / "two", *often, resume=True))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_with_the_weights_of_an_undisturbed_one(recipe, tmp_path, kills):
    script = Path(small_run.__file__)
    environment = os.environ | {"PYTHONPATH": f"{Path(veneer.__file__).parents[1]}:{script.parent}"}
    command = [sys.executable, "-W", "ignore", str(script), str(recipe), str(tmp_path), str(kills), "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) == kills
    assert same(tmp_path / "undisturbed", tmp_path / "killed")


def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(recipe, whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "out")
    for name in ("report.json", "adapter"):
        path = tmp_path / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    file = tmp_path / "out" / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1])
    lines = io.StringIO()
    resumed = go(recipe, tmp_path / "out", resume=True, lines=lines)
    said = lines.getvalue()
    assert "checkpoint-6 is damaged (optimizer.pt has changed); going on from the one before" in said
    assert "checkpoint-4" in said
    assert same(whole, resumed)


def test_a_run_that_was_killed_while_it_saved_its_result_is_not_trained_on(recipe, whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "adapter")
    (tmp_path / "out" / "report.json").unlink()
    resumed = go(recipe, tmp_path / "out", resume=True)
    assert same(whole, resumed)
    assert resumed.metrics == whole.metrics
    assert resumed.report["log"] == [entry for entry in whole.report["log"] if "train_loss" not in entry]


def test_two_runs_cannot_write_into_one_folder(recipe, tmp_path):
    with (
        checkpoint.locked(tmp_path / "out"),
        pytest.raises(RunError, match=r"Another run is writing into .*out. Wait for it"),
    ):
        go(recipe, tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_named(recipe, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/out cannot be written: Not a directory. Name another output."):
        go(recipe, tmp_path / "file" / "out")


def test_a_full_disk_leaves_the_last_checkpoint_whole(recipe, whole, tmp_path, monkeypatch):
    digest, left = checkpoint._digest, [8]

    def full(path):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return digest(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_digest", full)
        with pytest.raises(
            RunError, match=r"Step 4 could not be saved .*No space left on device; checkpoint-2 is whole"
        ):
            go(recipe, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()} == {"checkpoint-2"}
    assert same(whole, go(recipe, tmp_path / "out", resume=True))


# --- what goes wrong


def test_out_of_memory_takes_smaller_micro_batches_of_the_same_steps(recipe, tmp_path, monkeypatch):
    real = run.RecipeTrainer.training_step

    def step(self, model, inputs, *args):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self, model, inputs, *args)

    monkeypatch.setattr(run.RecipeTrainer, "training_step", step)
    result = go(recipe, tmp_path / "out")
    assert result.report["micro_batch_size"] == 2
    assert result.report["retries"] == [{"micro_batch_size": 4, "error": "CUDA out of memory. Tried to allocate 2 GiB"}]
    monkeypatch.undo()
    assert same(result, go(recipe, tmp_path / "two", "training.micro_batch_size=2"))
    monkeypatch.setattr(run.RecipeTrainer, "training_step", step)
    with pytest.raises(RunError, match=r"does not hold 4 examples at once .*Set training.micro_batch_size lower"):
        go(recipe, tmp_path / "three", "training.micro_batch_size=4")


def test_a_loss_that_is_no_number_stops_with_step_rows_and_advice(recipe, tmp_path, monkeypatch):
    real = run.RecipeTrainer.compute_loss

    def loss(self, model, inputs, *args, **kwargs):
        return real(self, model, inputs, *args, **kwargs) * (math.nan if self.state.global_step == 2 else 1)

    monkeypatch.setattr(run.RecipeTrainer, "compute_loss", loss)
    said = (
        r"nan at step 3 in a batch of training rows \d+, \d+, \d+, \d+; set training.learning_rate lower \(it is 0.01\)"
    )
    with pytest.raises(Diverged, match=said):
        go(recipe, tmp_path / "out")


def test_a_loss_that_explodes_stops(recipe, tmp_path, monkeypatch):
    real = run.RecipeTrainer.compute_loss

    def loss(self, model, inputs, *args, **kwargs):
        return real(self, model, inputs, *args, **kwargs) * (30 if self.state.global_step == 3 else 1)

    monkeypatch.setattr(run.RecipeTrainer, "compute_loss", loss)
    with pytest.raises(Diverged, match=r"became \d+ at step 4, after [\d.]+; set training.learning_rate lower"):
        go(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.held_out=0", "evaluation.every=1"], "evaluation.every needs held-out rows"),
        (["data.held_out=0", "evaluation={keep: best}"], "evaluation.keep needs held-out rows"),
        (["data.held_out=0", "evaluation={patience: 2}"], "evaluation.patience needs held-out rows"),
        (["data.packing=true", "evaluation.metrics=[chrf]"], "evaluation.metrics are of written answers"),
        (["training.parallel=fsdp"], "fsdp needs several processes: torchrun"),
        (["model=/no/where"], "cannot be loaded"),
        (["model.revision=main"], "model.revision is for Hub ids"),
    ],
)
def test_what_would_change_nothing_is_refused(recipe, tmp_path, overrides, message):
    with pytest.raises(RecipeError, match=message):
        go(recipe, tmp_path / "out", *overrides)


@pytest.mark.parametrize("override", ["model=sample:smolm", "data.path=sample:smolm"])
def test_an_unknown_sample_is_named_with_the_nearest(recipe, tmp_path, override):
    with pytest.raises(MissingSample, match=r"sample:smolm is no sample of Veneer's. Closest: sample:smollm2"):
        go(recipe, tmp_path / "out", override)


# --- every option acts


def test_patience_ends_a_run_and_best_keeps_its_best(recipe, tmp_path):
    spoils = ["training.learning_rate=0.5", "training.steps=40", "evaluation={every: 1, patience: 3, keep: best}",
              "training.schedule=constant", "training.warmup=0"]  # fmt: skip
    result = go(recipe, tmp_path / "out", *spoils)
    losses = {entry["step"]: entry["eval_loss"] for entry in result.report["log"] if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert result.report["kept_step"] == best
    assert result.report["steps"] == best + 3 < 40
    assert result.report["stopped_early"]
    assert result.metrics["loss"] == pytest.approx(losses[best], rel=1e-5)


def test_a_run_that_was_best_early_and_killed_while_it_saved_its_result_is_not_trained_on(
    recipe, tmp_path, monkeypatch
):
    spoils = ["training.learning_rate=0.5", "training.steps=40", "evaluation={every: 1, patience: 3, keep: best}"]
    spoils += ["training.checkpoint_every=1", "training.schedule=constant", "training.warmup=0"]
    with monkeypatch.context() as patch:
        patch.setattr(run._Run, "_save", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go(recipe, tmp_path / "out", *spoils)
    shutil.copytree(tmp_path / "out", tmp_path / "two")
    result = go(recipe, tmp_path / "out", *spoils, resume=True)
    assert result.report["stopped_early"]
    assert result.report["steps"] == result.report["kept_step"] + 3
    (tmp_path / "two" / "best.safetensors").unlink()
    with pytest.raises(RunError, match=r"best.safetensors is gone"):
        go(recipe, tmp_path / "two", *spoils, resume=True)


WEIGHTS = {  # these end with other weights than the plain run
    "model.dtype": "bfloat16",
    "model.quantization": "nf4",
    "training.epochs": None,
    "training.steps": 5,
    "training.learning_rate": 2e-2,
    "training.schedule": "linear",
    "training.warmup": 0.5,
    "training.batch_size": 8,
    "training.weight_decay": 0.5,
    "training.max_grad_norm": 0.01,
    "training.lora_plus_ratio": 4.0,
    "training.seed": 1,
    "training.group_by_length": "false",
}
ELSEWHERE = {
    "model.name": "test_every_task_trains",
    "model.revision": "test_what_would_change_nothing_is_refused",
    "training.parallel": "test_what_would_change_nothing_is_refused",
    "training.micro_batch_size": "test_out_of_memory_takes_smaller_micro_batches_of_the_same_steps",
    "training.gradient_checkpointing": "test_options_that_change_no_weight_change_something_else",
    "training.checkpoint_every": "test_options_that_change_no_weight_change_something_else",
    "training.keep_checkpoints": "test_options_that_change_no_weight_change_something_else",
    "training.trackers": "test_options_that_change_no_weight_change_something_else",
    "evaluation.every": "test_a_run_leaves_what_it_says",
    "evaluation.patience": "test_patience_ends_a_run_and_best_keeps_its_best",
    "evaluation.keep": "test_patience_ends_a_run_and_best_keeps_its_best",
    "evaluation.metrics": "test_options_that_change_no_weight_change_something_else",
    "evaluation.max_new_tokens": "test_options_that_change_no_weight_change_something_else",
    "evaluation.limit": "test_options_that_change_no_weight_change_something_else",
}


def test_every_option_is_shown_to_act():
    sections = {"model": recipes.Model, "training": recipes.Training, "evaluation": recipes.Evaluation}
    options = {f"{name}.{option}" for name, section in sections.items() for option in section.model_fields}
    assert WEIGHTS.keys() | ELSEWHERE.keys() == options
    assert set(ELSEWHERE.values()) <= globals().keys()


@pytest.mark.parametrize("option", WEIGHTS)
def test_an_option_changes_the_weights(recipe, whole, tmp_path, option):
    value = WEIGHTS[option]
    overrides = ["training.steps=null", "training.epochs=0.2"] if value is None else [f"{option}={value}"]
    assert not same(whole, go(recipe, tmp_path / "out", *overrides, "training.checkpoint_every=100"))


def test_options_that_change_no_weight_change_something_else(recipe, whole, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(LlamaForCausalLM, "activation_checkpointing_enable", lambda self, *a, **k: asked.append(1))
    result = go(
        recipe, tmp_path / "out", "training.checkpoint_every=1", "training.keep_checkpoints=3",
        "training.trackers=[tensorboard]", "training.gradient_checkpointing=true",
        "evaluation={every: 3, metrics: [chrf, exact_match], max_new_tokens: 3, limit: 2}",
    )  # fmt: skip
    assert asked
    assert checkpoint.steps(tmp_path / "out" / "checkpoints") == [4, 5, 6]
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))
    assert result.metrics.keys() == {"loss", "perplexity", "chrf", "exact_match"}
    assert len(result.report["examples"]) == 2
    assert all(len(example["answer"].encode()) <= 9 for example in result.report["examples"])
    assert same(whole, result)
