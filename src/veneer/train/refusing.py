"""What a recipe says that could not act with its data, its task or its folder."""

from __future__ import annotations

from pathlib import Path

from veneer.errors import RecipeError, RunError
from veneer.train import checkpoint, compiling, trackers
from veneer.train.machine import device
from veneer.train.metrics import WRITTEN
from veneer.train.processes import processes
from veneer.train.recipe import Recipe
from veneer.train.tasks import Task


def refuse(recipe: Recipe, task: Task) -> None:
    """RecipeError for all that could not act with these data."""
    trackers.refuse_missing(recipe.training.trackers)
    if recipe.training.compile:
        compiling.refuse_without_compiler()
    wrong = _idle(recipe, task)
    if task.name != "sequence_classification":  # labels may turn out to be numbers when all rows are read
        wrong += _idle_metrics(recipe, task)
    if wrong:
        raise RecipeError("\n".join(wrong))


def refuse_metrics(task: Task, recipe: Recipe) -> None:
    """RecipeError for metrics that mean nothing for a task."""
    wrong = _idle_metrics(recipe, task)
    if wrong:
        raise RecipeError("\n".join(wrong))


def refuse_used(folder: Path, resume: bool) -> None:
    """RunError where a folder holds a run already that is not to go on."""
    if resume:
        return
    if (folder / "report.json").exists():
        raise RunError(f"{folder} holds a finished run. Name another output, such as output={folder}-2.")
    if checkpoint.steps(folder / "checkpoints"):
        raise RunError(f"{folder} holds checkpoints of a run. Go on with --resume, or name another output.")


def _idle(recipe: Recipe, task: Task) -> list[str]:
    training, evaluation, data = recipe.training, recipe.evaluation, recipe.data
    wrong = []
    number = processes().num_processes
    at_once = number * (1 if training.micro_batch_size == "auto" else training.micro_batch_size)
    if training.batch_size % at_once:
        wrong.append(
            f"training.batch_size {training.batch_size} is not divided by what {number} processes compute at once, "
            f"{at_once}; an optimizer step is made of whole micro-batches in each."
        )
    if training.parallel == "fsdp" and number == 1:
        wrong.append("training.parallel: fsdp needs several processes: torchrun --nproc-per-node 2 -m veneer train ...")
    if training.parallel == "fsdp" and recipe.model.quantization == "bitsandbytes-8bit":
        wrong.append(
            "training.parallel: fsdp parts the weights that bitsandbytes-8bit computes with from their scales; "
            "take ddp, or bitsandbytes-4bit or nf4 as model.quantization."
        )
    if training.parallel == "fsdp" and training.loss == "chunked":
        wrong.append(
            "training.loss: chunked calls the head apart from its forward, and FSDP does not know; leave it out."
        )
    if training.parallel == "fsdp" and training.optimizer != "adamw":
        wrong.append(
            f"training.optimizer: {training.optimizer} keeps states of whole parameters, and FSDP parts them; "
            "take adamw, or ddp."
        )
    if training.optimizer == "paged-bitsandbytes" and device().type == "cpu":
        wrong.append("training.optimizer: paged-bitsandbytes pages nothing on a CPU; take paged, which pages all.")
    if training.parallel == "fsdp" and training.compile:
        wrong.append("training.compile: FSDP gathers each block's weights between graphs; take ddp, or leave it out.")
    if training.cache_frozen and number > 1:
        wrong.append("training.cache_frozen is for one process: several see other rows in each epoch; leave it out.")
    if training.cache_frozen and task.name in ("preference", "image_classification", "speech"):
        wrong.append("training.cache_frozen is for rows of tokens that are seen once a step; leave it out.")
    if data.streaming and training.cache_frozen:
        wrong.append("training.cache_frozen needs rows that come again, and data.streaming has none; leave it out.")
    if data.streaming and training.steps is None:
        wrong.append("training.steps is needed with data.streaming: nobody knows how long an epoch is.")
    if data.streaming and training.group_by_length:
        wrong.append("training.group_by_length changes nothing with data.streaming; leave it out.")
    if not data.shuffle and training.group_by_length:
        wrong.append("training.group_by_length makes an order of its own; leave it out, or data.shuffle: false.")
    if task.name == "image_classification" and training.group_by_length:
        wrong.append("training.group_by_length is for rows of tokens; leave it out.")
    if task.name == "image_classification" and data.streaming:
        wrong.append("data.streaming is not for images, which are read when they are needed anyway; leave it out.")
    if task.name != "preference" and training.dpo_beta is not None:
        wrong.append("training.dpo_beta is for rows with chosen and rejected answers; leave it out.")
    if not data.held_out:
        idle = [name for name in ("every", "patience", "metrics") if getattr(evaluation, name) is not None]
        idle += ["keep"] * (evaluation.keep == "best")
        wrong += [f"evaluation.{name} needs held-out rows; set data.held_out." for name in idle]
    return wrong


def _idle_metrics(recipe: Recipe, task: Task) -> list[str]:
    named = recipe.evaluation.metrics or ()
    wrong = [
        f"evaluation.metrics: {name} means nothing for {task.name}; there are: {', '.join(task.metrics)}."
        for name in named
        if name not in task.metrics
    ]
    if recipe.data.packing and set(named) & WRITTEN:
        wrong.append(
            f"evaluation.metrics of written answers ({', '.join(sorted(set(named) & WRITTEN))}) are for conversations "
            "that are not packed; leave them out."
        )
    return wrong
