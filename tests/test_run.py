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
from types import SimpleNamespace
from typing import ClassVar, get_args

import pytest
import small_run
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.integrations import integration_utils

import veneer
from veneer.errors import Diverged, MissingSample, RecipeError, RunError, Stopped
from veneer.train import attempt, checkpoint, models, run, trackers, using
from veneer.train import recipe as recipes
from veneer.train.data import Data, prepare
from veneer.train.tasks import preference


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
    base, adapted = veneer.train.figures(whole.folder / "adapter")
    assert adapted == pytest.approx(whole.metrics)
    assert base == pytest.approx(whole.before)
    assert len(veneer.train.answers(whole.folder / "adapter", ["thou 3", "thou 4"], max_new_tokens=4)) == 2


INPUTS = {
    "sequence_classification": ["good 1", "bad 2\tgood 3"],
    "regression": ["row 3", "row 4"],
    "seq2seq": ["thou 3", "thou 4 and more"],
    "image_classification": ["images/dark/0.png", "images/light/1.png"],
    "speech": ["tones/0.wav", "tones/1.wav"],
    "preference": ["thou 3", "thou 4"],
}


@pytest.mark.parametrize(
    ("model", "data", "task", "figures"),
    [
        ("bert", "classes.jsonl", "sequence_classification", {"loss", "accuracy", "f1"}),
        ("bert", "numbers.jsonl", "regression", {"loss", "mean_absolute_error"}),
        ("t5", "pairs.jsonl", "seq2seq", {"loss", "perplexity"}),
        ("vit", "images", "image_classification", {"loss", "accuracy", "f1"}),
        ("whisper", "speech.jsonl", "speech", {"loss", "perplexity"}),
        ("model", "preferences.jsonl", "preference", {"loss", "reward_accuracy", "reward_margin"}),
    ],
)
def test_every_task_trains(recipe, tmp_path, model, data, task, figures):
    folder = recipe.parent
    output = tmp_path / "out"
    overrides = [f"model={folder / model}", f"data.path={folder / data}", "training.steps=12"]
    result = go(recipe, output, *overrides)
    assert result.recipe.record.task == task
    assert result.metrics.keys() == figures
    assert result.metrics["loss"] < result.before["loss"]
    assert using.figures(output / "adapter", [])[1] == pytest.approx(result.metrics, rel=1e-4)
    assert bool(result.adapter.also_train) == (model in ("bert", "vit"))  # a head that the files do not have
    answers = veneer.train.answers(output / "adapter", [str(folder / one) for one in INPUTS[task]], max_new_tokens=3)
    assert len(answers) == 2
    if result.recipe.record.labels:
        assert set(answers) <= set(result.recipe.record.labels)
    elif task == "regression":
        assert all(math.isfinite(float(answer)) for answer in answers)


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
    (tmp_path / "elsewhere").mkdir()
    path = f"{Path(veneer.__file__).parents[1]}:{script.parent}"
    environment = os.environ | {"PYTHONPATH": path, "TMPDIR": str(tmp_path / "elsewhere")}
    command = [sys.executable, "-W", "ignore", str(script), str(recipe), str(tmp_path), str(kills), "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) == kills
    assert same(tmp_path / "undisturbed", tmp_path / "killed")
    left = [*(tmp_path / "killed").glob(".rows*"), *(tmp_path / "elsewhere").glob("veneer*")]
    assert not left  # nothing of the rows of those that were killed


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
    real = attempt.RecipeTrainer.training_step

    def step(self, model, inputs, *args):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self, model, inputs, *args)

    monkeypatch.setattr(attempt.RecipeTrainer, "training_step", step)
    result = go(recipe, tmp_path / "out")
    assert result.report["micro_batch_size"] == 2
    assert result.report["retries"] == [{"micro_batch_size": 4, "error": "CUDA out of memory. Tried to allocate 2 GiB"}]
    monkeypatch.undo()
    assert same(result, go(recipe, tmp_path / "two", "training.micro_batch_size=2"))
    monkeypatch.setattr(attempt.RecipeTrainer, "training_step", step)
    with pytest.raises(RunError, match=r"does not hold 4 examples at once .*Set training.micro_batch_size lower"):
        go(recipe, tmp_path / "three", "training.micro_batch_size=4")


def test_a_loss_that_is_no_number_stops_with_step_rows_and_advice(recipe, tmp_path, monkeypatch):
    real = attempt.RecipeTrainer.compute_loss

    def loss(self, model, inputs, *args, **kwargs):
        return real(self, model, inputs, *args, **kwargs) * (math.nan if self.state.global_step == 2 else 1)

    monkeypatch.setattr(attempt.RecipeTrainer, "compute_loss", loss)
    said = (
        r"nan at step 3 in a batch of training rows \d+, \d+, \d+, \d+; set training.learning_rate lower \(it is 0.01\)"
    )
    with pytest.raises(Diverged, match=said):
        go(recipe, tmp_path / "out")


def test_a_loss_that_explodes_stops(recipe, tmp_path, monkeypatch):
    real = attempt.RecipeTrainer.compute_loss

    def loss(self, model, inputs, *args, **kwargs):
        return real(self, model, inputs, *args, **kwargs) * (30 if self.state.global_step == 3 else 1)

    monkeypatch.setattr(attempt.RecipeTrainer, "compute_loss", loss)
    with pytest.raises(Diverged, match=r"became \d+ at step 4, after [\d.]+; set training.learning_rate lower"):
        go(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.held_out=0", "evaluation.every=1"], "evaluation.every needs held-out rows"),
        (["data.held_out=0", "evaluation={keep: best}"], "evaluation.keep needs held-out rows"),
        (["data.held_out=0", "evaluation={patience: 2}"], "evaluation.patience needs held-out rows"),
        (
            ["data.packing=true", "evaluation.metrics=[chrf]"],
            r"evaluation.metrics of written answers \(chrf\) are for conv",
        ),
        (["data.held_out=0", "evaluation={metrics: [perplexity]}"], "evaluation.metrics needs held-out rows"),
        (["evaluation.metrics=[accuracy]"], "accuracy means nothing for causal; there are: perplexity, bleu"),
        (["training.dpo_beta=0.1"], "training.dpo_beta is for rows with chosen and rejected"),
        (["training.head_learning_rate=0.1"], "has all its weights, so no head is trained whole"),
        (["data.shuffle=false", "training.group_by_length=true"], "group_by_length makes an order of its own"),
        (["method={AdapterFusion: {parts: [/no/a, /no/b]}}"], "/no/a is no folder of an adapter"),
        (["training.parallel=fsdp", "training.compile=true"], "FSDP gathers each block's weights"),
        (["training.parallel=fsdp", "training.optimizer=paged"], "paged keeps states of whole parameters"),
        (["training.optimizer=paged-bitsandbytes"], "pages nothing on a CPU; take paged"),
        (["training.parallel=fsdp"], "fsdp needs several processes: torchrun"),
        (["training.parallel=fsdp", "model.quantization=bitsandbytes-8bit"], "take ddp, or bitsandbytes-4bit or nf4"),
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
        patch.setattr(attempt.Run, "_save", lambda *args: 1 / 0)
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
    "data.shuffle": "false",
}
ELSEWHERE = {
    "model.name": "test_every_task_trains",
    "model.revision": "test_what_would_change_nothing_is_refused",
    "training.head_learning_rate": "test_a_head_learns_at_its_own_rate",
    "training.dpo_beta": "test_the_loss_of_preferences_is_that_of_the_paper",
    "training.parallel": "test_what_would_change_nothing_is_refused",
    "training.micro_batch_size": "test_out_of_memory_takes_smaller_micro_batches_of_the_same_steps",
    "training.gradient_checkpointing": "test_options_that_change_no_weight_change_something_else",
    "training.checkpoint_every": "test_options_that_change_no_weight_change_something_else",
    "training.keep_checkpoints": "test_options_that_change_no_weight_change_something_else",
    "training.optimizer": "test_every_optimizer_trains_and_goes_on",
    "training.trackers": "test_trackers_are_told_by_their_names",
    "evaluation.every": "test_a_run_leaves_what_it_says",
    "evaluation.patience": "test_patience_ends_a_run_and_best_keeps_its_best",
    "evaluation.keep": "test_patience_ends_a_run_and_best_keeps_its_best",
    "evaluation.metrics": "test_options_that_change_no_weight_change_something_else",
    "evaluation.max_new_tokens": "test_options_that_change_no_weight_change_something_else",
    "evaluation.limit": "test_options_that_change_no_weight_change_something_else",
}


OTHER_FILES = {
    "data.shuffle": "test_run.py",
    "training.cache_frozen": "test_frozen.py",
    "training.loss": "test_frozen.py",
    "training.compile": "test_compiling.py",
}


def test_every_option_is_shown_to_act():
    sections = {"model": recipes.Model, "training": recipes.Training, "evaluation": recipes.Evaluation}
    options = {f"{name}.{option}" for name, section in sections.items() for option in section.model_fields}
    assert WEIGHTS.keys() | ELSEWHERE.keys() | OTHER_FILES.keys() == options | {"data.shuffle"}
    assert all(name.split(".")[1] in Path(__file__).with_name(file).read_text() for name, file in OTHER_FILES.items())
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
        "training.gradient_checkpointing=true",
        "evaluation={every: 3, metrics: [chrf, exact_match], max_new_tokens: 3, limit: 2}",
    )  # fmt: skip
    assert asked
    assert checkpoint.steps(tmp_path / "out" / "checkpoints") == [4, 5, 6]
    assert result.metrics.keys() == {"loss", "chrf", "exact_match"}
    assert len(result.report["examples"]) == 2
    assert all(len(example["answer"].encode()) <= 9 for example in result.report["examples"])
    assert same(whole, result)


@pytest.mark.parametrize(("name", "alike"), [("flat", True), ("paged", True), ("adamw-8bit", False)])
def test_every_optimizer_trains_and_goes_on(recipe, whole, tmp_path, monkeypatch, name, alike):
    made, real = [], veneer.optimizer
    monkeypatch.setattr(veneer, "optimizer", lambda *args, **options: made.append(real(*args, **options)) or made[-1])
    out, option = tmp_path / "out", f"training.optimizer={name}"
    result = go(recipe, out, option)
    assert type(made[0]).__name__ == {"flat": "FlatAdamW", "paged": "PagedAdamW", "adamw-8bit": "AdamW8bit"}[name]
    assert result.metrics["loss"] < result.before["loss"]
    assert same(whole, result) == alike
    shutil.copytree(out / "adapter", tmp_path / "undisturbed" / "adapter")
    (out / "report.json").unlink()
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    assert same(go(recipe, out, option, resume=True), tmp_path / "undisturbed")


class Told(TrainerCallback):
    """A tracker as transformers has them: made without arguments, by its name."""

    runs: ClassVar[list] = []

    def __init__(self):
        self.logs = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.runs.append((args.run_name, self.logs))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_trackers_are_told_by_their_names(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(__spec__="found"))
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Told)
    monkeypatch.setattr(Told, "runs", [])
    go(recipe, tmp_path / "both", "training.trackers=[tensorboard, wandb]", "training.steps=2")
    assert list((tmp_path / "both" / "tensorboard").glob("events*"))
    [(name, logs)] = Told.runs
    assert name == str(tmp_path / "both")
    assert [{"loss", "learning_rate"} <= each.keys() for each in logs if "loss" in each] == [True, True]
    assert any("eval_loss" in each for each in logs)
    go(recipe, tmp_path / "one", "training.trackers=wandb", "training.steps=1")
    go(recipe, tmp_path / "none", "training.trackers=none", "training.steps=1")
    assert len(Told.runs) == 2
    assert not list(tmp_path.glob("*ne/tensorboard"))


def test_trackers_that_are_not_there_are_named_with_their_packages(recipe, tmp_path, monkeypatch):
    for module in ("mlflow", "comet_ml"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError) as caught:
        go(recipe, tmp_path / "out", "training.trackers=[mlflow, comet_ml]")
    assert str(caught.value).splitlines() == [
        "training.trackers: mlflow is not installed. Run: pip install mlflow",
        "training.trackers: comet_ml is not installed. Run: pip install comet-ml",
    ]
    assert not (tmp_path / "out").exists()


def test_trackers_are_those_of_transformers():
    assert {*get_args(trackers.Tracker), "kubeflow"} == integration_utils.INTEGRATION_TO_CALLBACK.keys()


def test_a_base_in_nf4_is_packed_as_it_is_read(recipe, monkeypatch):
    name = recipes.load(recipe).model.name
    dense, _ = models.base(recipes.Model(name=name), "causal", None)
    expected = veneer.quantize(dense, veneer.NF4()).state_dict()
    monkeypatch.setattr(veneer, "quantize", None)
    found, fresh = models.base(recipes.Model(name=name, quantization="nf4"), "causal", None)
    found = found.state_dict()
    assert (found.keys(), fresh) == (expected.keys(), [])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("quantization", ["bitsandbytes-4bit", "bitsandbytes-8bit"])
def test_bitsandbytes_bases_train(recipe, tmp_path, quantization):
    result = go(recipe, tmp_path / "out", f"model.quantization={quantization}")
    assert result.model.is_quantized or result.model.config.quantization_config
    assert result.metrics["loss"] < result.before["loss"]
    assert using.figures(tmp_path / "out" / "adapter", [])[1] == pytest.approx(result.metrics, rel=1e-3)


def test_rows_are_taken_in_the_order_of_the_file_where_nothing_shuffles(recipe, tmp_path, monkeypatch):
    seen, real = [], attempt.RecipeTrainer.training_step

    def step(self, model, inputs, *args):
        seen.extend(inputs["row_numbers"].tolist())
        return real(self, model, inputs, *args)

    monkeypatch.setattr(attempt.RecipeTrainer, "training_step", step)
    go(recipe, tmp_path / "out", "data.shuffle=false")
    assert seen == list(range(24))


def test_a_head_learns_at_its_own_rate(recipe, tmp_path):
    task = [f"model={recipe.parent / 'bert'}", f"data.path={recipe.parent / 'classes.jsonl'}"]
    result = go(recipe, tmp_path / "out", *task, "training.head_learning_rate=1e-30")
    head = dict(result.adapter.named_parameters())
    start = {name: p for name, p in result.model.named_parameters() if name in ("classifier.weight", "classifier.bias")}
    for name, parameter in start.items():
        torch.testing.assert_close(head[f"{name}.0.value"], parameter, rtol=0, atol=1e-20)  # it stays as it started
    assert any(parameter.any() for name, parameter in head.items() if name.endswith("B"))


def test_gates_and_fusions_are_written_in_recipes(recipe, tmp_path):
    gated = go(recipe, tmp_path / "gated", "method={Gated: {LoRA: {rank: 2}, PrefixTuning: {length: 2}}}")
    assert {type(one.method).__name__ for one in gated.adapter.claims} == {"Gated"}
    assert gated.metrics["loss"] < gated.before["loss"]
    for name, seed in (("one", 1), ("two", 2)):
        go(recipe, tmp_path / name, "method={BottleneckAdapter: {width: 4}}", f"training.seed={seed}")
    parts = f"[{tmp_path / 'one' / 'adapter'}, {tmp_path / 'two' / 'adapter'}]"
    fused = go(recipe, tmp_path / "fused", f"method={{AdapterFusion: {{parts: {parts}, regularization: 0.1}}}}")
    [method] = {one.method.regularization for one in fused.adapter.claims}
    assert method == 0.1
    assert using.figures(tmp_path / "fused" / "adapter", [])[1] == pytest.approx(fused.metrics, rel=1e-4)


@pytest.mark.parametrize(
    ("model", "data", "metrics"),
    [
        ("bert", "classes.jsonl", ["accuracy", "f1", "f1_micro", "matthews_correlation"]),
        ("bert", "numbers.jsonl", ["mean_absolute_error", "pearsonr", "spearmanr"]),
        ("t5", "pairs.jsonl", ["chrf", "bleu", "rouge", "exact_match", "perplexity"]),
        ("whisper", "speech.jsonl", ["wer", "evaluation.max_new_tokens=8"]),
    ],
)
def test_metrics_are_those_that_are_named(recipe, tmp_path, model, data, metrics):
    task = [f"model={recipe.parent / model}", f"data.path={recipe.parent / data}", "training.steps=2"]
    task += [each for each in metrics if "=" in each]
    metrics = [each for each in metrics if "=" not in each]
    result = go(recipe, tmp_path / "out", *task, f"evaluation.metrics=[{', '.join(metrics)}]")
    expected = {each for name in metrics for each in (("rouge1", "rouge2", "rougeL") if name == "rouge" else (name,))}
    assert result.metrics.keys() == {"loss"} | expected


def test_the_loss_of_preferences_is_that_of_the_paper(recipe):
    torch.manual_seed(0)
    model, _ = models.base(recipes.Model(name=str(recipe.parent / "model")), "preference", None)
    adapter = veneer.attach(model, veneer.LoRA(rank=4))
    batch = {
        "input_ids": torch.randint(0, 200, (4, 9)),
        "attention_mask": torch.tensor([[1] * 9] * 2 + [[1] * 7 + [0] * 2] * 2),
        "completion_mask": torch.tensor([[0] * 5 + [1] * 4] * 2 + [[0] * 5 + [1] * 2 + [0] * 2] * 2),
    }
    assert preference.loss(model, batch).item() == pytest.approx(math.log(2))  # the adapter changes nothing yet
    for name, parameter in adapter.named_parameters():
        if name.endswith("B"):
            torch.nn.init.normal_(parameter, std=0.5)

    def summed(row):
        logits = model(batch["input_ids"][row : row + 1], attention_mask=batch["attention_mask"][row : row + 1]).logits
        logs = logits[0, :-1].log_softmax(-1)
        places = [n for n in range(9) if batch["completion_mask"][row, n]]
        return sum(logs[n - 1, batch["input_ids"][row, n]] for n in places)

    with torch.no_grad():
        policy = torch.stack([summed(row) for row in range(4)])
        with veneer.use(model):
            base = torch.stack([summed(row) for row in range(4)])
    for beta in (0.1, 0.7):
        ratios = beta * (policy - base)
        expected = -torch.nn.functional.logsigmoid(ratios[:2] - ratios[2:]).mean()
        assert preference.loss(model, batch, beta).item() == pytest.approx(expected.item(), rel=1e-5)
    preference.loss(model, batch).backward()
    assert all(parameter.grad.any() for parameter in adapter.parameters())
    assert sum(p.grad is not None for p in model.parameters()) == len(list(adapter.parameters()))


@pytest.mark.filterwarnings("ignore")  # of TRL, about transformers
def test_the_loss_of_preferences_is_that_of_trl(recipe, tmp_path):
    trl = pytest.importorskip("trl")
    import datasets

    place = str(recipe.parent / "model")
    model, _ = models.base(recipes.Model(name=place), "preference", None)
    tokenizer = models.processing(recipes.Model(name=place), "preference")
    dense, _ = models.base(recipes.Model(name=place), "preference", None)  # TRL's own reference, which is a copy
    adapter = veneer.attach(model, veneer.LoRA(rank=4))
    for name, parameter in adapter.named_parameters():
        if name.endswith("B"):
            torch.nn.init.normal_(parameter, std=0.5)
    rows = prepare(Data(path=str(recipe.parent / "preferences.jsonl"), held_out=0), tokenizer, seed=0)
    batch = rows.collate([rows.train[row] for row in range(4)])
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", beta=0.3, gradient_checkpointing=False, bf16=False
    )
    table = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    trainer = trl.DPOTrainer(model, dense, arguments, train_dataset=table, processing_class=tokenizer)
    theirs = trainer.compute_loss(model, batch)
    assert preference.loss(model, batch, 0.3).item() == pytest.approx(theirs.item(), rel=1e-4)
    assert theirs.item() != pytest.approx(math.log(2), rel=1e-2)
