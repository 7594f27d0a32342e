"""`veneer plan`: what every method takes on a model and a device, counted without weights."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from veneer.cli.commands import Json, app
from veneer.collecting import uncollected
from veneer.errors import PlanError, VeneerError


@app.command()
@uncollected()
def plan(
    model: Annotated[str | None, typer.Argument(help="A folder, a Hub id, or a name such as llama3.1:8b.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="lora, lora:rank=16, qlora, full, none, lora+prefix, …; 'all' for every one; repeatable."),
    ] = None,
    where: Annotated[str | None, typer.Option(help="Where the method goes; its own default otherwise.")] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", "--device", help="A device (rtx-4090), its memory (24GB), auto or cpu.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 1,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens of an example.")] = 512,
    dtype: Annotated[str | None, typer.Option(help="Of the base: bfloat16, float16, float32.")] = None,
    quantization: Annotated[str | None, typer.Option(help="nf4: the base in 4 bits, for every method.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, paged, paged-bitsandbytes or adamw-8bit.")] = "adamw",
    checkpointing: Annotated[bool, typer.Option(help="Compute activations again in backward.")] = False,
    loss: Annotated[str, typer.Option(help="whole, or chunked.")] = "whole",
    explain: Annotated[bool, typer.Option("--explain", help="Show the arithmetic of each line.")] = False,
    chart: Annotated[Path | None, typer.Option(help="Draw memory by part into this PNG.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure steps on this machine first, and keep what they tell of it.")
    ] = False,
    json: Json = False,
) -> None:
    """Plan a fine-tuning: parameters, memory by part, time, adapter size and inference overhead, for every method.

    Needs a config only. Examples: veneer plan llama3.1:8b --gpu 24GB; veneer plan ./model --method lora:rank=16
    """

    from veneer.plan import devices, fitting, lines
    from veneer.plan.plan import config_of
    from veneer.plan.plan import plan as planned
    from veneer.quantizing import NF4

    console, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    if calibrate:
        _calibrate(notes)
        if model is None:
            return
    if model is None:
        raise PlanError("Name a model to plan for, such as llama3.1:8b.")
    if quantization not in (None, "nf4"):
        raise PlanError(f"There is no quantization '{quantization}'. Give nf4, or leave it out.")
    packed = NF4() if quantization else None
    names = lines.every() if method == ["all"] else method or list(lines.USUAL)
    wanted = [lines.line(name, packed) for name in names]
    device = devices.device("auto" if gpu == "cpu" else gpu) if gpu else None
    config: Any = config_of(model)
    found, failed = [], {}
    for one in track(wanted, "Counting", console=notes, transient=True, disable=json or not notes.is_terminal):
        try:
            made = planned(
                config,
                one.method,
                where,
                batch_size=batch,
                sequence_length=sequence,
                dtype=dtype,
                quantization=one.quantization,
                optimizer=optimizer,
                checkpointing=checkpointing,
                loss=loss,
                device=device,
            )
        except VeneerError as error:
            if method and method != ["all"]:
                raise
            failed[one.name] = str(error)
            continue
        found.append((one.name, made))
    if not found:
        raise PlanError(f"Nothing could be planned for {model}: {next(iter(failed.values()))}")
    least = min(found, key=lambda pair: pair[1].peak.expected)
    asked = found if method and method != ["all"] else [(name, one) for name, one in found if name in ("lora", "qlora")]
    limits = {name: _limits(one, device, fitting) for name, one in asked} if device else {}
    fit = [one for _, one in found if device and one.fits(device.memory)]
    cures = fitting.remedies(least[1]) if device and not fit else []
    if chart is not None:
        from veneer.plan.chart import draw

        draw(dict(found), chart, device)
    if json:
        plans = {name: made.as_dict() | limits.get(name, {}) for name, made in found}
        changes = {cure.change: cure.plan.peak.as_dict() for cure in cures}
        print(json_text.dumps({"plans": plans, "failed": failed, "remedies": changes}))
        return
    console.print(f"{model}, {batch} × {sequence} tokens" + (f", on {device.name}" if device else ""))
    console.print(_table(found, device))
    for name, why in failed.items():
        console.print(f"{name} is left out: {why}")
    for name, most in limits.items():
        console.print(f"{name}: batch up to {most['largest_batch']}, or sequence up to {most['largest_sequence']:,}")
    if cures:
        console.print(f"Nothing is sure to fit. {least[0]} takes least; what would lower it:")
        for cure in cures:
            console.print(f"  {cure.change}: {_gib(cure.plan.peak.expected)}")
    if explain:
        for name, made in found:
            console.print(f"\n{name}\n{made.explain()}")


def _calibrate(console: Console) -> None:
    from veneer.plan.calibrating import calibrate

    found = calibrate()
    known = found.constants
    console.print(
        f"{found.device.name}: {known.products:.0%} of its rate for products, {known.bandwidth:.0%} of its bandwidth, "
        f"{1e6 * known.call:.1f} µs a call, kept in {found.path}"
    )
    console.print(f"Mean error of a held-out step's time: {found.before:.0%} before, {found.after:.0%} after.")


def _limits(plan: Any, device: Any, fitting: Any) -> dict[str, int]:
    return {
        "largest_batch": fitting.largest_batch(plan, device.memory),
        "largest_sequence": fitting.largest_sequence(plan, device.memory),
    }


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _table(found: list[tuple[str, Any]], device: Any) -> Table:
    from veneer.plan.plan import PARTS

    table = Table("method", "trainable", "share", title="memory in GiB", title_justify="left")
    for part in (*PARTS, "peak"):
        table.add_column("dense W" if part == "dequantization" else part, justify="right")
    for name in ("step s", "adapter MiB", "inference"):
        table.add_column(name, justify="right")
    if device:
        table.add_column("fits")
    for name, plan in found:
        sizes = [f"{plan.memory[part].expected / 2**30:.2f}" for part in PARTS]
        peak = " – ".join(f"{size / 2**30:.1f}" for size in (plan.peak.low, plan.peak.high))
        seconds = f"{plan.step_seconds.expected:.2g}" if plan.step_seconds else "–"
        kept = "merged 0" if not plan.merged.calls else f"+{plan.unmerged.flops:.1%}, stays"
        row = [name, f"{plan.trainable:,}", f"{plan.share:.3%}", *sizes, peak, seconds]
        row += [
            f"{plan.adapter_bytes / 2**20:,.1f}",
            f"+{plan.unmerged.flops:.1%}, merged 0" if kept[0] == "m" else kept,
        ]
        if device:
            row.append({True: "yes", False: "no", None: "perhaps"}[plan.fits(device.memory)])
        table.add_row(*row)
    return table
