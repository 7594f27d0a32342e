"""The commands, one function each; typer makes their options and help from the signatures."""

from __future__ import annotations

import json as json_text
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import veneer
from veneer.errors import AdapterError, FileError

app = typer.Typer(
    help="Parameter-efficient fine-tuning of transformer models.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="First: [bold]veneer demo --quick[/bold]. Exit codes: 0 done, 1 a server would not take it "
    "(export --check), 2 a mistake to mend, 130 stopped by a signal.",
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs instead of text.")]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Parameter-efficient fine-tuning of transformer models."""
    if show:
        print(veneer.__version__)
        raise typer.Exit


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for adapter, merged model, report and loss curve.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and verses: under three minutes.")] = False,
    seed: Annotated[int, typer.Option(help="Chooses held-out verses and the start of the adapter.")] = 0,
    json: Json = False,
) -> None:
    """Fine-tune a real language model with LoRA, on this machine, and measure it.

    SmolLM2-135M learns to turn King James verses into modern English. Example: veneer demo --quick
    """
    from veneer.demo import run_demo

    run_demo(output, quick, seed, json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter's folder, a checkpoint's, or a transformers model's.")],
    json: Json = False,
) -> None:
    """Show what an adapter's or a checkpoint's folder holds, or draw a model: one block of each kind and its roles.

    Examples: veneer inspect runs/demo/adapter; veneer inspect runs/x/checkpoints/checkpoint-20; veneer inspect
    runs/demo/merged
    """
    if (path / "veneer.json").exists():
        found = _adapter(path)
    elif (path / "config.json").exists():
        from veneer.cli import diagram
        from veneer.seams import loading

        config = loading.config_of(str(path), None)
        found = diagram.describe(loading.without_weights(config, loading.class_of(config)))
        if stored := loading.stored_bits(path):
            found["nf4"] = {"weights": stored[0], "bits": stored[1]}
    elif (path / "checksums.json").exists():
        found = _checkpoint(path)
    else:
        raise FileError(
            f"{path} is neither an adapter's folder (veneer.json), nor a checkpoint's (checksums.json), nor a model's "
            "(config.json)."
        )
    if json:
        print(json_text.dumps(found))
    elif "blocks" in found:
        print("\n".join(diagram.lines(found)))
    else:
        _print(str(path), found)


def _checkpoint(path: Path) -> dict[str, Any]:
    """Where a run was at a checkpoint, and whether its files are whole."""
    from veneer import files
    from veneer.train.checkpoint import wrong

    state = files.read_json(path / "trainer_state.json")
    log = state.get("log_history") or []
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    damage = wrong(path)
    return {
        "step": state.get("global_step"),
        "of": state.get("max_steps"),
        "epoch": state.get("epoch"),
        "last loss": f"{losses[-1][1]:.4g} at step {losses[-1][0]}" if losses else "none logged yet",
        "state": f"damaged: {damage}; resuming passes it over" if damage else "whole: veneer train RECIPE --resume",
        "files": {one.name: f"{one.stat().st_size:,} bytes" for one in sorted(path.iterdir())},
    }


def _adapter(path: Path) -> dict[str, Any]:
    """Methods, places and tensors of an adapter's folder."""
    from veneer import files, store

    recipe = store.read_recipe(path)
    tensors = files.read_tensors(path / recipe.tensors.file)
    return {
        "base": " ".join(value for value in recipe.base.values() if value),
        "veneer": recipe.veneer,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "tensors": len(tensors),
        "file": recipe.tensors.file,
        "read by Hugging Face PEFT": recipe.tensors.file == store.PEFT_TENSORS,
        "methods": {f"{claim.method} where='{claim.where}'": f"{len(claim.places)} places" for claim in recipe.claims},
        "also trained whole": recipe.also_train,
    }


def _print(title: str, found: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in found.items():
        if isinstance(value, dict):
            for name, text in value.items():
                table.add_row(name, str(text))
        else:
            table.add_row(key, f"{value:,}" if type(value) is int else str(value))
    Console().print(table)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="The dense model: a folder, or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="Where the 4-bit model goes; must not exist yet.")],
    block_size: Annotated[int, typer.Option(help="Weights that share a magnitude: 32, 64, ... 4096.")] = 64,
    no_double_quant: Annotated[
        bool, typer.Option("--no-double-quant", help="Magnitudes in 32 bits, not in 8.")
    ] = False,
    skip: Annotated[
        list[str] | None, typer.Option(help="Modules to leave dense: a glob or re:REGEX; repeat it.")
    ] = None,
    json: Json = False,
) -> None:
    """Store a model's linears and experts in four bits (NF4), weight by weight, and save it with bitsandbytes' keys.

    The dense model is never in memory. veneer.load_quantized opens the folder, and so does transformers with
    bitsandbytes where no experts are in it.

    Examples: veneer quantize my-model my-model-nf4; veneer quantize my-model small --skip o_proj
    """
    from veneer.seams import loading

    if output.exists():
        raise FileError(f"{output} exists already; name a new folder for the 4-bit model.")
    method = veneer.NF4(block_size, double_quant=not no_double_quant)
    loading.save(veneer.load_quantized(model, method, skip=skip or ()), output, source=model)
    weights, bits = loading.stored_bits(output) or (0, 0.0)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    done = {"output": str(output), "weights": weights, "bits": bits, "bytes": size}
    said = f"Stored {weights:,} weights in {bits:.3f} bits each; the model is in {output}, {size / 1e6:,.1f} MB."
    print(json_text.dumps(done) if json else said)


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="The base: a folder, or a Hub id.")],
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder of Veneer or PEFT, or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="Where the merged model goes; must not exist yet.")],
    nf4: Annotated[
        bool, typer.Option("--nf4", help="The adapter was trained on this base in NF4: merge with those weights.")
    ] = False,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Store a base that bitsandbytes quantized in few bits again.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Measure what merging costs on the lines of this file.", show_default="built in")
    ] = None,
    json: Json = False,
) -> None:
    """Fold an adapter into a causal language model, measure what that costs, and save a plain transformers folder.

    A quantized base becomes a plain one with the numbers that its bits stand for, since the adapter was trained beside
    those; --requantize rounds the sum to few bits again, at a loss that is printed.

    Examples: veneer merge my-model runs/demo/adapter merged; veneer merge my-model qlora-adapter merged --nf4
    """
    from veneer.seams import transformers

    if output.exists():
        raise FileError(f"{output} exists already; name a new folder for the merged model.")
    if nf4 and requantize:
        raise AdapterError("--nf4 with --requantize would round twice. Leave one of them out.")
    base = transformers.language_model(model)
    if nf4:
        veneer.quantize(base, veneer.NF4())
    handle = veneer.load(base, adapter)
    places = len(handle.claims)
    batch = transformers.tokenized(model, _lines(text) if text else SENTENCES)
    drift = veneer.merge(base, handle, permanent=True, requantize=requantize, check=batch)
    if not requantize:
        veneer.dequantize(base)
    transformers.save_language_model(base, model, output)
    done: dict[str, Any] = {"output": str(output), "merged_places": places}
    done |= {"parameters": veneer.count_parameters(base).total, "drift": drift and asdict(drift)}
    if json:
        print(json_text.dumps(done))
        return
    print(f"Merged {places} places; the plain model is in {output}.")
    print(f"Against the unmerged model: {drift}." if drift else f"{model} has no tokenizer to measure the cost with.")


SENTENCES = [
    "The ship left the harbour before dawn, and nobody on the quay knew where it was bound.",
    "To make the dough, mix 500 g of flour with 300 ml of water, a little salt and the yeast, and leave it to rise.",
    "def area(width, height):\n    return width * height",
    "Question: which is larger, 17 times 3 or 50? Answer: 17 times 3 is 51, so it is larger.",
]


def _lines(file: Path) -> list[str]:
    try:
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{file} cannot be read as text: {error}.") from None
    if not found:
        raise FileError(f"{file} has no line of text to measure on.")
    return found
