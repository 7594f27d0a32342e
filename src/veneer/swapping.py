"""swap: the numbers of one adapter after another in the same place, in milliseconds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer import files, store
from veneer.delta import Delta
from veneer.errors import AdapterError, CorruptFile
from veneer.handle import Adapter, handle, runs, state_of
from veneer.interop import peft
from veneer.interop.peft.common import Entry
from veneer.references import OWN_TENSORS
from veneer.refilling import Refill
from veneer.store import PEFT_CONFIG, PEFT_TENSORS, RECIPE


def swap(model: nn.Module, adapter: Adapter | str, folder: str | Path, *, revision: str | None = None) -> Adapter:
    """Put the numbers of the adapter in a folder, or of a Hub id, in the place of those of an attached one.

    The two must have the same methods, options and places, as adapters of one recipe have. Nothing is attached, so it
    takes milliseconds, compiled code goes on to run, and an optimizer keeps its parameters. Keys, shapes and numbers
    are checked before anything is changed, the file's checksum is not: that alone would take longer.

    Raises AdapterError where the two differ, or the attached one is merged; otherwise as `load` does.
    """
    adapter = handle(model, adapter)
    if adapter.name in state_of(model).routes.merged:
        raise AdapterError(f"Adapter '{adapter.name}' is merged into the weights. Call veneer.unmerge first.")
    path = store.located(folder, revision)
    described, name = _described_by(path)
    if adapter.refill is not None and adapter.refill.take(described, path / name):
        return adapter
    tensors, base = _same(adapter, path, name)
    expected = store.expected_in(name, adapter.claims, path)
    store.compare(expected, tensors, path / name, base)
    for key, tensor in expected.items():
        if torch.promote_types(tensor.dtype, tensors[key].dtype) != tensor.dtype:
            raise AdapterError(
                f"{path / name}: {key} is {tensors[key].dtype}, which {tensor.dtype} cannot hold. Load the folder."
            )
    checked = any(type(claim.delta).verify is not Delta.verify for claim in adapter.claims)
    before = {key: tensor.clone() for key, tensor in adapter.state_dict().items()} if checked else {}
    store.fill_from(name, adapter.claims, tensors)
    try:
        store.verify(adapter.claims, path / name)
    except CorruptFile:
        adapter.load_state_dict(before)
        raise
    owners = [tensor for _, tensor in adapter.named_tensors()]
    shared = {tensor.data_ptr() for tensor in expected.values()} == {owner.data_ptr() for owner in owners}
    alike = all(tensor.dtype == tensors[key].dtype for key, tensor in expected.items())
    if shared and alike and not checked:
        adapter.refill = Refill(described, expected, owners, path / name)
    return adapter


def _described_by(path: Path) -> tuple[bytes, str]:
    """What a folder says of its adapter, without the checksum, and the file that its tensors are in."""
    if (path / RECIPE).exists():
        content = (path / RECIPE).read_bytes()
        name = OWN_TENSORS if f'"{OWN_TENSORS}"'.encode() in content else PEFT_TENSORS
        return re.sub(rb'"sha256": "[0-9a-f]{64}"', b"", content), name
    if (path / PEFT_CONFIG).exists():
        return (path / PEFT_CONFIG).read_bytes(), PEFT_TENSORS
    raise store.no_adapter(path)


def _same(adapter: Adapter, path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a folder and the base they are for; AdapterError where they are not of the adapter's recipe."""
    tensors = files.read_tensors(path / name)
    if (path / RECIPE).exists():
        recipe = store.read_recipe(path)
        if recipe.parts:
            raise AdapterError(f"{path} is a fusion whose parts lie elsewhere. Load it instead.")
        _same_claims(adapter, [store.entry_of(claim, path) for claim in recipe.claims], path)
        return tensors, recipe.base
    config = files.read_json(path / PEFT_CONFIG)
    tensors = peft.without_copies(tensors, config)
    entries = peft.from_config(adapter.model, config, set(tensors), str(path / PEFT_CONFIG))
    _same_claims(adapter, entries, path)
    return tensors, store.peft_base(config)


def _same_claims(adapter: Adapter, entries: Sequence[Entry], path: Path) -> None:
    if any(claim.delta.waits for claim in adapter.claims) or adapter.folded() is not adapter:
        raise AdapterError(f"{adapter!r} holds more than is saved of it. Load the folder under another name instead.")
    own = [
        (run[0].method, {(place.path, place.spans) for claim in run for place in (claim.place, *claim.place.tied)})
        for run in runs(adapter.claims)
    ]
    theirs = [(entry.method, set(entry.places)) for entry in entries]
    if own != theirs:
        methods = ", ".join(str(method) for method, _ in theirs)
        raise AdapterError(f"{path} holds {methods}, at other places or with other options than {adapter!r}. Load it.")
