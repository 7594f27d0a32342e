"""The commands that run recipes and use what came of them: train, eval, generate, recipes."""

from __future__ import annotations

import json as json_text
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from veneer.cli.commands import Json, app
from veneer.errors import FileError

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Options on top of the recipe: training.steps=100", metavar="[KEY=VALUE]...")
]
recipes_app = typer.Typer(help="The recipes that Veneer brings: list, show, copy.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of one that Veneer brings.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")] = False,
    json: Json = False,
) -> None:
    """Train an adapter by a recipe, measure it, and save all that repeats the run.

    Examples: veneer train film-reviews; veneer train my.yaml training.learning_rate=1e-4 output=runs/second;
    torchrun --nproc-per-node 2 -m veneer train my.yaml training.parallel=fsdp
    """
    from veneer.train import shipped
    from veneer.train.processes import processes
    from veneer.train.run import train as run

    result = run(shipped.find(recipe), overrides or [], resume=resume, console=Console(stderr=True, highlight=False))
    if not processes().is_main_process:
        return
    if json:
        print(json_text.dumps({"output": str(result.folder), **result.report}))
        return
    _table(result.before, result.metrics, ("base", "adapted"))
    board = "tensorboard/ " * ("tensorboard" in result.recipe.training.trackers)
    print(f"In {result.folder}: adapter/ with recipe.yaml, report.json, curve.png, {board}and checkpoints/")


@app.command()
def eval(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder that `veneer train` made: runs/x/adapter.")],
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Measure an adapter, and its base alone, on the held-out rows of its recipe, or on others.

    Example: veneer eval runs/first/adapter data.held_out=test.jsonl evaluation.metrics=[chrf]
    """
    from veneer.train import using

    base, adapted = using.figures(adapter, overrides or [])
    if json:
        print(json_text.dumps({"base": base, "adapted": adapted}))
    else:
        _table(base, adapted, ("base", "adapted"))


@app.command()
def generate(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder that `veneer train` made: runs/x/adapter.")],
    prompt: Annotated[str | None, typer.Argument(help="What to answer: a prompt, a text, or a path.")] = None,
    file: Annotated[Path | None, typer.Option(help="Answer each line of this file instead.")] = None,
    system: Annotated[
        str | None, typer.Option(help="The system message; the recipe's data.system if left out.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How long an answer may be.")] = 128,
    json: Json = False,
) -> None:
    """Answer one input, each line of a file, or a person at a terminal, with what `veneer train` made.

    Always the likeliest words. Without an input a terminal becomes a chat with a language model: /base answers the last
    question by the base alone, /reset forgets the conversation, /quit ends it. A model of another task takes what it
    was trained on: a text (a tab between two), the path of an image or of a recording; it answers with a text, the
    name of a class, or a number.

    Examples: veneer generate runs/verses/adapter "Thou art mine." --system "Rewrite in modern English."; veneer
    generate runs/verses/adapter; veneer generate runs/film-reviews/adapter "A lovely film."
    """
    from veneer.train import using

    if prompt is None and file is None and not json and sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  # lets input() edit a line and take back those before
        using.chat(adapter, max_new_tokens, system, lambda: input("> "), lambda text: print(text, end="", flush=True))
        return
    if (prompt is None) == (file is None):
        raise FileError("Give a prompt or --file, one of the two.")
    try:
        prompts = [prompt] if prompt is not None else Path(str(file)).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{file} cannot be read: {error}.") from None
    answers = using.answers(adapter, prompts, max_new_tokens, system)
    if json:
        print(json_text.dumps([{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]))
    else:
        print("\n".join(answers))


@recipes_app.command("list")
def list_recipes(json: Json = False) -> None:
    """Name the recipes that Veneer brings, and what each does."""
    from veneer.train import shipped

    found = shipped.every()
    if json:
        print(json_text.dumps(found))
    else:
        for name, what in found.items():
            print(f"{name:20} {what}")


@recipes_app.command()
def show(name: Annotated[str, typer.Argument(help="A recipe's name.")]) -> None:
    """Print a recipe. Example: veneer recipes show film-reviews"""
    from veneer.train import shipped

    print(shipped.named(name).read_text(encoding="utf-8"), end="")


@recipes_app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A recipe's name.")],
    to: Annotated[Path, typer.Argument(help="The file to write; must not exist yet.")],
) -> None:
    """Copy a recipe, to be changed. Example: veneer recipes copy film-reviews my.yaml"""
    from veneer.train import shipped

    text = shipped.named(name).read_text(encoding="utf-8")
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise FileError(f"{to} cannot be written: {error.strerror}.") from None


def _table(first: dict[str, float], second: dict[str, float], heads: tuple[str, str]) -> None:
    table = Table("", *heads)
    for name, value in second.items():
        before = f"{first[name]:.4g}" if name in first else ""
        table.add_row(name.replace("_", " "), before, f"{value:.4g}")
    if second:
        Console().print(table)
