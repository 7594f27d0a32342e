"""`veneer choose`: constraints to a ranked list of methods, with reasons and the recipe to run."""

from __future__ import annotations

import json as json_text
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from veneer.cli.commands import Json, app
from veneer.collecting import uncollected


@app.command()
@uncollected()
def choose(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id, or a name: llama:7b, bert:base.")],
    gpu: Annotated[str, typer.Option("--gpu", help="A device (rtx-4090), its memory (24GB), or auto.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Examples that are computed at once.")] = 1,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens of an example.")] = 512,
    checkpointing: Annotated[bool, typer.Option(help="Compute activations again in backward.")] = True,
    zero_overhead: Annotated[
        bool, typer.Option("--zero-overhead", help="Nothing may be left in a forward once trained.")
    ] = False,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks that one base serves, switched by request.")] = 1,
    storage: Annotated[float | None, typer.Option(min=0, help="MiB that a task may take.")] = None,
    share: Annotated[float | None, typer.Option(min=0, max=100, help="Percent of parameters that may train.")] = None,
    quality_first: Annotated[bool, typer.Option("--quality-first", help="Measured quality before cost.")] = False,
    examples: Annotated[int | None, typer.Option(min=1, help="Examples to train on, once over.")] = None,
    hours: Annotated[float | None, typer.Option(min=0, help="How long that may take.")] = None,
    data: Annotated[str, typer.Option(help="What the recipe trains on.")] = "data.jsonl",
    json: Json = False,
) -> None:
    """Choose a method for a model and a device: what fits, what is best under constraints, why, and a recipe.

    Examples: veneer choose llama:7b --gpu 24GB --batch 8 --sequence 2048; veneer choose bert:base --gpu t4 --tasks 50
    """
    from veneer.plan import choose as choosing

    choices = choosing.choose(
        model,
        gpu,
        batch=batch,
        length=sequence,
        checkpointing=checkpointing,
        zero_overhead=zero_overhead,
        tasks=tasks,
        storage_per_task=None if storage is None else round(storage * 2**20),
        most_parameters=None if share is None else share / 100,
        quality_first=quality_first,
        examples=examples,
        hours=hours,
        data=data,
    )
    notes = choosing.advice(choices, tasks=tasks, quality_first=quality_first)
    if json:
        print(json_text.dumps({"choices": [each.as_dict() for each in choices], "later_evidence": notes}))
        return
    console = Console(highlight=False)
    for place, each in enumerate(choices, start=1):
        console.print(Text(f"{place}. {each.name}" + (" — not here" if each.barred else ""), "bold"))
        for line in (*each.barred, *each.reasons):
            console.print(Text(f"   {line}"))
    if choices[0].barred:
        console.print(
            Text("Nothing fits. A smaller batch, a shorter sequence or a smaller model is what is left.", "bold")
        )
        return
    for note in notes:
        console.print(Text(f"Later evidence: {note}"))
    console.print(Text("\nThe recipe; a preset has no weights, so name a folder or Hub id as the model:", "bold"))
    console.print(Text(choices[0].recipe))
