"""`veneer data`: what a recipe or a file would train on, before any of it is trained on."""

from __future__ import annotations

import json as json_text
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from veneer.cli.commands import Json, app


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="A recipe (.yaml), or a file, folder or id to train on.")],
    tokenizer: Annotated[
        str, typer.Option(help="A model's folder or id, for its tokenizer; a recipe names its own.")
    ] = "",
    examples: Annotated[int, typer.Option("-n", "--examples", min=0, help="How many examples to print.")] = 3,
    json: Json = False,
) -> None:
    """Show what would be trained on: examples, lengths, what is cut, what repeats, what leaks into the held-out rows.

    What is only read is dim; what is learned is not. Look here before the first run: a mask that is off by one token
    trains a model that never stops.

    Example: veneer data conversations.jsonl --tokenizer runs/demo/merged -n 1
    """
    from veneer.train.look import look

    seen = look(source, tokenizer, examples)
    if json:
        found = seen.prepared.report.as_dict() | {"fingerprint": seen.prepared.fingerprint}
        print(json_text.dumps(found | {"examples": [text.plain for text in seen.examples]}, ensure_ascii=False))
        return
    console = Console(highlight=False)
    for number, text in enumerate(seen.examples, start=1):
        console.print(Text(f"--- example {number}", "bold"))
        console.print(text)
    if seen.examples:
        console.print(Text("--- all", "bold"))
    for line in seen.prepared.report.lines():
        console.print(Text(line))
