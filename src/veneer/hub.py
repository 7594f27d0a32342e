"""Uploading a folder to the Hugging Face Hub, with a model card that says what it is, on what, and how to use it."""

from __future__ import annotations

import json
from pathlib import Path

from veneer import files, store
from veneer.errors import FileError
from veneer.interop import adapterhub

CARD = "README.md"


def push(folder: Path, name: str, source: Path | None = None) -> str:
    """Upload an exported folder as `owner/name`, which is made (private) where it is not there; returns its address.

    A model card is written into the folder first, unless it has one. `source` is the folder that the adapter was saved
    in, whose figures go into the card where `veneer train` made it. Raises FileError for whatever the Hub answers.
    """
    if name.count("/") != 1:
        raise FileError(f"'{name}' is no Hub id of the form 'owner/name'.")
    from huggingface_hub import HfApi

    if not (folder / CARD).exists():
        files.write(folder, {CARD: card(folder, name, source).encode()})
    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Uploaded by veneer export")
    except Exception as error:  # every client error is the user's to act on, whatever its class
        raise FileError(f"{folder} is written, but uploading it to {name} failed: {error}") from error
    return str(address)


def card(folder: Path, name: str, source: Path | None) -> str:
    """The model card of an exported folder."""
    base, library, use = "", "transformers", f'AutoModelForCausalLM.from_pretrained("{name}")'
    if (folder / store.PEFT_CONFIG).exists() or (folder / adapterhub.FUSION_CONFIG).exists():
        peft = (folder / store.PEFT_TENSORS).exists()
        library = "peft" if peft else "adapters"
        described = folder / (store.PEFT_CONFIG if (folder / store.PEFT_CONFIG).exists() else adapterhub.FUSION_CONFIG)
        base = store.peft_base(files.read_json(described))["name_or_path"]
        use = f'veneer.load(model, "{name}")'
    lines = ["---", f"library_name: {library}", "tags: [veneer]"]
    if base and not Path(base).exists():  # a folder of this machine says nothing to others
        lines.append(f"base_model: {json.dumps(base)}")
    lines += ["---", "", f"# {name.partition('/')[2]}", "", f"Trained with Veneer{f' on {base}' if base else ''}.", ""]
    lines += ["```python", use, "```", ""]
    if source is not None and (source.parent / "report.json").exists():
        report = files.read_json(source.parent / "report.json")
        lines += ["| held out | base | adapted |", "|---|---|---|"]
        before, after = report.get("before") or {}, report.get("metrics") or {}
        lines += [f"| {key} | {before.get(key, float('nan')):.4g} | {value:.4g} |" for key, value in after.items()]
        lines.append("")
    return "\n".join(lines)
