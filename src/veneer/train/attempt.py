"""A run of a recipe, loaded, trained, measured and saved; where memory does not suffice, attempted again."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback, TrainerState, set_seed

import veneer
from veneer import sharding, site
from veneer.errors import RecipeError, Stopped
from veneer.ops import kernels
from veneer.samples import whole
from veneer.seams.quiet import quiet
from veneer.train import checkpoint, method_sections, models, tasks, trackers
from veneer.train.arguments import arguments
from veneer.train.callback import AdapterCallback
from veneer.train.compiling import CompiledBlocks
from veneer.train.curve import draw
from veneer.train.data import Prepared, check_packing
from veneer.train.frozen import FrozenBlocks
from veneer.train.machine import device, peak_bytes
from veneer.train.measure import measure
from veneer.train.order import Order
from veneer.train.processes import processes, share_out
from veneer.train.progress import History, Watch
from veneer.train.recipe import Recipe
from veneer.train.scores import Written, score
from veneer.train.trainer import Collate, Numbered, RecipeTrainer
from veneer.train.watching import Best, Sanity, Signals


@dataclass
class Result:
    """What came of a run: the adapter on its model, and the figures, which `report.json` holds too."""

    adapter: veneer.Adapter
    model: Any
    tokenizer: Any
    folder: Path
    recipe: Recipe
    metrics: dict[str, float]
    before: dict[str, float]
    report: dict[str, Any] = field(repr=False)


class Run:
    """One resolved recipe with its data, which may take several attempts."""

    def __init__(self, recipe: Recipe, prepared: Prepared, processing: Any, console: Console, signals: Signals) -> None:
        assert recipe.record is not None, "a resolved recipe has one"
        self.recipe = recipe
        self.prepared = prepared
        self.processing = processing
        self.task = tasks.of(prepared.task, recipe.training.dpo_beta)
        self.console = console
        self.signals = signals
        self.folder = Path(recipe.output)
        self.checkpoints = self.folder / "checkpoints"
        self.retries: list[dict[str, Any]] = []
        self.started = time.perf_counter()
        self.steps = recipe.record.steps

    def attempt(self, micro: int, resume: bool) -> Result:
        """Load, attach, train, measure and save, with `micro` examples computed at once."""
        recipe, training = self.recipe, self.recipe.training
        set_seed(training.seed)
        model, fresh = models.base(recipe.model, self.prepared.task, self.prepared.labels)
        if training.head_learning_rate is not None and not fresh:
            raise RecipeError(
                f"training.head_learning_rate: {recipe.model.name} has all its weights, so no head is trained whole. "
                "Leave it out."
            )
        adapter = method_sections.attach(model, recipe.method, fresh)
        if self.prepared.packed:
            check_packing(model)
        chunked = models.chunked(model, training.loss, training.parallel)
        held_out, collate, metrics = self.prepared.held_out, self.prepared.collate, recipe.evaluation.metrics
        measured = partial(measure, model, held_out, collate, self.task, micro, metrics)
        before = measured() if held_out is not None else {}
        best = self.folder / "best.safetensors" if recipe.evaluation.keep == "best" else None
        watch = Watch(self.console)
        trainer = self._trainer(model, adapter, micro, measured, watch, best)
        start = checkpoint.newest(self.checkpoints, self.console.print) if resume else None
        if start is not None:
            self.console.print(f"Going on from {start}.")
        torch.manual_seed(training.seed + processes().process_index)  # else all would drop the same units
        with watch.bar, quiet():
            if not (start is not None and self._is_done(start, trainer)):
                trainer.train(resume_from_checkpoint=None if start is None else str(start))
        state = trainer.state
        if self.signals.caught is not None and state.global_step < self.steps:
            raise Stopped(
                f"Stopped by {self.signals.caught.name} after step {state.global_step} of {self.steps}, which is "
                f"saved. Go on with: veneer train {self.folder / 'recipe.yaml'} --resume"
            )
        model.eval()
        trainer.best.take_back()
        written = score(model, self.processing, held_out, collate, self.task, recipe.evaluation, training.seed)
        figures = (measured() if held_out is not None else {}) | written.metrics
        report = self._report(adapter, trainer, watch.history, before, figures, written, micro)
        if isinstance(chunked, str):
            report["loss"] = f"whole: {chunked}"
        else:
            report["loss"] = "chunked"
            chunked.remove()
        self._save(adapter, trainer, report)
        if best is not None and processes().is_main_process:
            best.unlink()
        return Result(adapter, model, self.processing, self.folder, recipe, figures, before, report)

    def _frozen(self, model: Any) -> FrozenBlocks:
        """What lies below the adapters, kept; RecipeError where no row comes twice."""
        rows, prepared = len(self.prepared.train), self.prepared
        if self.steps * self.recipe.training.batch_size <= rows:
            raise RecipeError(
                f"training.cache_frozen: {self.steps} steps of {self.recipe.training.batch_size} see none of {rows} "
                "rows twice, so nothing kept is ever read. Leave it out, or train more epochs."
            )
        found = FrozenBlocks(model, prepared.collate, prepared.train, prepared.train["length"], self.folder)
        self.console.print(
            f"What the {found.count} frozen blocks compute is kept on disk while it trains: {found.bytes / 1e6:.1f} MB."
        )
        return found

    def _is_done(self, start: Path, trainer: RecipeTrainer) -> bool:
        """Whether a checkpoint is the last of its run, whose state the trainer then takes over."""
        state = TrainerState.load_from_json(str(start / "trainer_state.json"))
        if state.global_step < self.steps and not trainer.best.lost(state):
            return False
        trainer.state = state
        trainer.take_weights(start)
        return True

    def _trainer(
        self, model: Any, adapter: veneer.Adapter, micro: int, measured: Any, watch: Watch, best: Path | None
    ) -> RecipeTrainer:
        recipe, training, prepared = self.recipe, self.recipe.training, self.prepared
        order = None
        if not recipe.data.streaming:
            grouped = training.group_by_length is not False and recipe.data.shuffle
            lengths = prepared.train["length"] if grouped and "length" in prepared.train.column_names else None
            rows, seed = len(prepared.train), training.seed
            order = Order(rows, training.batch_size, lengths, seed, recipe.data.shuffle)
        if training.gradient_checkpointing:
            veneer.checkpoint_activations(model)
        frozen = self._frozen(model) if training.cache_frozen else None
        trainer = RecipeTrainer(
            measure=measured,
            task=self.task,
            order=order,
            make_optimizer=partial(
                veneer.optimizer,
                adapter,
                training.optimizer,
                lr=recipe.learning_rate,
                lora_plus_ratio=training.lora_plus_ratio,
                head_lr=training.head_learning_rate,
                weight_decay=training.weight_decay,
                **({"folder": self.folder} if training.optimizer == "paged" and device().type == "cpu" else {}),
            ),
            folder=self.checkpoints,
            keep=training.keep_checkpoints,
            advice=lambda: (
                f"set training.learning_rate lower (it is {recipe.learning_rate:g}) or training.warmup higher, and "
                "look at those rows with: veneer data"
            ),
            model=model,
            args=arguments(
                output_dir=str(self.checkpoints),
                max_steps=self.steps,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=training.batch_size // micro // processes().num_processes,
                learning_rate=recipe.learning_rate,
                lr_scheduler_type="constant_with_warmup" if training.schedule == "constant" else training.schedule,
                warmup_steps=math.ceil(training.warmup * self.steps),
                max_grad_norm=training.max_grad_norm,
                seed=training.seed,
                eval_strategy="steps" if prepared.held_out is not None else "no",
                eval_steps=recipe.evaluation.every,
                save_strategy="steps",
                save_steps=training.checkpoint_every or self.steps,
                run_name=str(self.folder),
                report_to=trackers.told_by_trainer(training.trackers),
            ),
            data_collator=Collate(prepared.collate),
            train_dataset=prepared.train if recipe.data.streaming else Numbered(prepared.train),
            eval_dataset=prepared.held_out,
            callbacks=[
                AdapterCallback(adapter),
                self.signals,
                watch,
                *trackers.tensorboard(training.trackers, self.folder / "tensorboard"),
            ],
            best=Best(adapter, best, recipe.evaluation.patience),
            frozen=frozen,
            compiled=CompiledBlocks(model, 0 if frozen is None else frozen.count) if training.compile else None,
        )
        if training.parallel == "fsdp":
            share_out(model)
            trainer.is_distributed_loading_by_transformers = True  # as of one that was loaded in parts
        trainer.add_callback(Sanity(trainer.advice))
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _report(
        self,
        adapter: veneer.Adapter,
        trainer: RecipeTrainer,
        history: History,
        before: dict[str, float],
        metrics: dict[str, float],
        written: Written,
        micro: int,
    ) -> dict[str, Any]:
        count = veneer.count_parameters(adapter.model)
        state = trainer.state
        return {
            "before": before,
            "metrics": metrics,
            "steps": state.global_step,
            "kept_step": state.best_global_step if self.recipe.evaluation.keep == "best" else state.global_step,
            "stopped_early": state.global_step < self.steps,
            "trainable": count.trainable,
            "total": count.total,
            "micro_batch_size": micro,
            "retries": self.retries,
            "tokens_per_second": history.tokens_per_second,
            "step_seconds": history.step_seconds,
            "seconds": round(time.perf_counter() - self.started, 2),
            "compiled": None if trainer.compiled is None else trainer.compiled.as_dict(),
            "kernels": [str(choice) for choice in kernels.choices()],
            "peak_bytes": peak_bytes(device()),
            "data": self.prepared.report.as_dict(),
            "log": state.log_history,
            "examples": written.examples,
        }

    def _save(self, adapter: veneer.Adapter, trainer: RecipeTrainer, report: dict[str, Any]) -> None:
        sharding.gather(part for _, here in list(site.sites(adapter.model)) for part in here.modules())
        if not processes().is_main_process:
            return

        def fill(folder: Path) -> None:
            veneer.save(adapter, folder)
            self.processing.save_pretrained(folder)
            (folder / "recipe.yaml").write_text(self.recipe.yaml(), encoding="utf-8")

        whole.replace(self.folder / "adapter", fill)
        history = History.of(trainer.state.log_history, report["before"].get("loss"))
        whole.replace(self.folder / "curve.png", lambda path: draw(history, path))
        text = json.dumps(report, indent=2, ensure_ascii=False)
        whole.replace(self.folder / "report.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
