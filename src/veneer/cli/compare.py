"""`veneer compare`: methods against each other on the user's own task."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from veneer.cli.commands import Json, app


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of one that Veneer brings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Options on top of the recipe: data.limit=1000", metavar="[KEY=VALUE]...")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Names with commas: lora, qlora, dora, prefix, prompt, adapter, "
            "parallel, full, or any method by its own name."
        ),
    ] = "lora,qlora,prefix,adapter,parallel,dora,full",
    output: Annotated[Path, typer.Option(help="Folder of the comparison; with the same command it goes on there.")] = (
        Path("runs/compared")
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    budget: Annotated[
        str | None, typer.Option(help="Of each run: tokens=N, seconds=N or steps=N.", show_default="the recipe's")
    ] = None,
    search: Annotated[
        tuple[str, int] | None,
        typer.Option(help="Choose each method's rate on training rows: learning_rate 3", metavar="OPTION COUNT"),
    ] = None,
    sweep: Annotated[list[str] | None, typer.Option(help="Try an option's values: rank=4,8,16; repeat it.")] = None,
    rates: Annotated[
        str, typer.Option(help="Learning rates: lora=2e-3,full=1e-4", show_default="each method's own")
    ] = "",
    base: Annotated[
        str | None, typer.Option(help="The method that others are compared with.", show_default="the first")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="General text to measure forgetting on.", show_default="Python's manual")
    ] = None,
    json: Json = False,
) -> None:
    """Train several methods on one task under an equal budget, measure them, and write a report.

    Each run has a process of its own. Given again, the command goes on where it was stopped; more methods, seeds and
    values of a sweep can be added to what is there.

    Example: veneer compare film-reviews --methods lora,dora,full --budget steps=120 --search learning_rate 3
    """
    from veneer.compare import Budget, Search, summary
    from veneer.compare import compare as run
    from veneer.compare.contenders import learning_rates, sweeps
    from veneer.train import recipe as recipes
    from veneer.train import shipped

    console = Console(stderr=True, highlight=False)
    comparison = run(
        recipes.load(shipped.find(recipe), overrides or []),
        [name for name in methods.split(",") if name.strip()],
        output,
        seeds=seeds,
        budget=Budget.read(budget) if budget else None,
        search=Search.read(*search) if search else None,
        sweep=sweeps(sweep or []),
        rates=learning_rates(rates),
        base=base,
        text=None if text is None else str(text),
        console=console,
    )
    found = summary.write(comparison)
    if json:
        print(json_text.dumps(found))
        return
    Console().print(summary.table(found))
    print(f"In {output}: comparison.html, comparison.csv, comparison.json, and every run in cells/")
