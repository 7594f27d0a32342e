"""What `veneer.plan` expects a run's peak of memory to be, part by part, to stand beside the one that was measured."""

from __future__ import annotations

from veneer.errors import VeneerError
from veneer.plan.devices import Device
from veneer.plan.plan import plan
from veneer.train.attempt import Result
from veneer.train.data import Prepared
from veneer.train.machine import device


def parts(result: Result, prepared: Prepared, before: int) -> dict[str, int] | str:
    """Bytes by part at the highest moment of a step, or why there is no plan of it.

    `before` is what the process had before a model was loaded, its libraries in use; it is the first part, in place of
    what a plan says of processes, CUDA's context and the allocator's slack, because the measured peak has none of
    these. On a CPU the last part is what malloc keeps of what was freed. The step has as many rows as were computed at
    once, all as long as the longest training row; no method's batches are longer.
    """
    recipe = result.recipe
    if "input_ids" not in prepared.train.column_names:
        return f"Only steps on token ids with the model's own loss are planned, not those of {prepared.task}."
    if recipe.model.quantization not in (None, "nf4"):
        return f"A base in {recipe.model.quantization} is not planned, only one in nf4."
    here = Device(str(device()), memory=0, bandwidth=None, flops={}, kind=device().type, source="")
    try:
        planned = plan(
            result.model,
            recipe.methods(),
            also_train=result.adapter.also_train,
            batch_size=result.report["micro_batch_size"],
            sequence_length=max(prepared.train["length"]),
            optimizer=recipe.training.optimizer,
            checkpointing=recipe.training.gradient_checkpointing,
            loss="chunked" if result.report["loss"] == "chunked" else "whole",
            device=here,
        )
    except VeneerError as error:
        return str(error)
    highest = planned.highest
    expected = {name: round(part.expected) for name, part in highest.items() if name != "overhead"}
    if here.kind == "cpu":
        expected["kept by malloc"] = round(highest["overhead"].expected - highest["overhead"].low)
    return {"before": before} | expected
