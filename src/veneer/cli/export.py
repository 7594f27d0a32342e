"""The command that writes adapters in other programs' files, and says what those programs will not take."""

from __future__ import annotations

import json as json_text
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import veneer
from veneer import hub
from veneer.cli.commands import Json, app
from veneer.errors import FileError
from veneer.exporting import To
from veneer.interop.servers import Server

REFUSED = 1
"""Exit code: a server would refuse the adapter, or compute something else."""


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder of Veneer, PEFT or a run, or a Hub id.")],
    to: Annotated[str | None, typer.Option(help="What to write: peft, adapterhub, gguf-lora or merged.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where it goes; must not exist yet.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The base: a folder or Hub id.", show_default="the one the adapter names")
    ] = None,
    check: Annotated[
        str | None, typer.Option(help="Say what vllm, sglang, llama.cpp or peft would not take of it, and why.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Bring what is no LoRA (DoRA, VeRA, OFT, ...) to LoRA of this rank.")
    ] = None,
    pad_rank: Annotated[
        bool, typer.Option("--pad-rank", help="One rank and scale for all modules: the next rank that vLLM knows.")
    ] = False,
    drop_whole: Annotated[
        bool, typer.Option("--drop-whole", help="Leave out what was trained whole: heads, biases, norms.")
    ] = False,
    push: Annotated[str | None, typer.Option(help="Upload what was written, with a model card: owner/name.")] = None,
    json: Json = False,
) -> None:
    """Write an adapter for another program, or check what that program would not take of it.

    With --check alone nothing is written; with --to the check is of what was written. Exit codes: 0 done and taken, 1
    the server would refuse it or compute something else, 2 a mistake to mend.

    Examples: veneer export runs/x/adapter --check vllm; veneer export runs/x/adapter --to peft --output served
    --pad-rank --check vllm; veneer export dora-adapter --to peft --output plain --lora-rank 16
    """
    if to is None and check is None:
        raise FileError("Give --to with --output to write, --check to check, or both.")
    if (to is None) != (output is None):
        raise FileError("--to and --output go together: what to write, and where.")
    if to is None and push is not None:
        raise FileError("--push uploads what was written. Give --to and --output as well.")
    if to is None and (lora_rank is not None or pad_rank or drop_whole or model is not None):
        raise FileError("--model, --lora-rank, --pad-rank and --drop-whole change what is written. Give --to as well.")
    if to in ("merged", "gguf-lora") and check is not None:
        raise FileError(f"--check reads PEFT's files, and --to {to} writes no adapter in them. Leave --check out.")
    done: dict[str, Any] = {}
    if to is not None and output is not None:
        base, handle = _opened(adapter, model)
        written = veneer.export(
            base,
            handle,
            output,
            to=cast(To, to),
            lora_rank=lora_rank,
            pad_rank=pad_rank,
            drop_whole=drop_whole,
        )
        done = {"output": str(written.folder), "to": to, "errors": dict(written.errors)}
        if push is not None:
            done["url"] = hub.push(output, push, source=Path(adapter) if Path(adapter).is_dir() else None)
    found = None if check is None else veneer.refusals(output or adapter, cast(Server, check))
    if found is not None:
        done |= {"server": check, "findings": [asdict(one) for one in found]}
    print(json_text.dumps(done) if json else _text(done))
    if found is not None and any(one.kind != "setting" for one in found):
        raise typer.Exit(REFUSED)


def _opened(adapter: str, model: str | None) -> tuple[Any, veneer.Adapter]:
    """The base with the adapter attached."""
    from veneer import store
    from veneer.seams import loading

    path = store.located(adapter, None)
    if model is None and (path / "recipe.yaml").exists():
        from veneer.train import using

        _, base, _ = using.opened(path)
        return base, veneer.adapters(base)["default"]
    described = store.base_of(path)
    source = model or described.get("name_or_path")
    if not source:
        raise FileError(f"{adapter} does not say which model it was made on. Name it with --model.")
    base = loading.base_of(source, described.get("class", ""))
    return base, veneer.load(base, path)


def _text(done: dict[str, Any]) -> str:
    lines = []
    if "output" in done:
        lines.append(f"{done['output']} holds the adapter for {done['to']}.")
        if "url" in done:
            lines.append(f"Uploaded to {done['url']}.")
        errors = done["errors"]
        if errors:
            worst = max(errors, key=errors.__getitem__)
            mean = sum(errors.values()) / len(errors)
            lines.append(
                f"The lower rank leaves out {mean:.2%} of the change in the mean, {errors[worst]:.2%} at {worst}."
            )
    if "findings" in done:
        if not done["findings"]:
            lines.append(f"{done['server']} takes it as it is.")
        lines += [f"{one['kind']}: {one['what']} Way out: {one['way_out']}" for one in done["findings"]]
    return "\n".join(lines)
