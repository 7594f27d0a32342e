"""A fusion saved by reference: its parts stay in folders of their own, and are not written twice.

A part's tensor is called `<path>.<number>.parts.<part>.<parameter>` in the fusion and `<path>.0.bottleneck.<parameter>`
in the part's own folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import pydantic
import torch
from torch import Tensor

from veneer import files
from veneer.errors import AdapterError, CorruptFile, closest, listed

OWN_TENSORS = "veneer.safetensors"
_KEY = re.compile(r"(?P<path>.+)\.\d+\.parts\.(?P<part>[^.]+)\.(?P<parameter>.+)")


class Reference(pydantic.BaseModel, extra="forbid", strict=True):
    """Where a part's tensors are, and the digest of their file: a Hub id, or ./ and a path from the fusion's folder."""

    folder: Annotated[str, pydantic.Field(min_length=1)]
    sha256: str


def keys(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """For each part, its tensors' keys in the fusion by those in its own folder."""
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        if match := _KEY.fullmatch(key):
            own = f"{match['path']}.0.bottleneck.{match['parameter']}"
            found.setdefault(match["part"], {})[own] = key
    return found


def take_out(
    tensors: dict[str, Tensor], parts: Mapping[str, tuple[str, Path]], folder: Path
) -> tuple[dict[str, Tensor], dict[str, Reference]]:
    """The tensors without those of the parts named, each with (what the user called its folder, the local one).

    Raises AdapterError where there is no such part, or its folder holds other numbers.
    """
    known = keys(tensors)
    references: dict[str, Reference] = {}
    for part, (called, local) in parts.items():
        if part not in known:
            there = f"Its parts are {', '.join(known)}." if known else "Only a fusion has parts."
            raise AdapterError(f"The adapter has no part '{part}'.{closest(part, known)} {there}")
        found = files.read_tensors(local / OWN_TENSORS)
        other = [
            own for own, key in known[part].items() if own not in found or not torch.equal(found[own], tensors[key])
        ]
        if other:
            raise AdapterError(
                f"The part '{part}' in {local} is not what the fusion was made of: {listed(other)}. Name the folder "
                "that it was saved in, or leave it out to write it with the fusion."
            )
        place = os.path.join(".", os.path.relpath(local, folder)) if Path(called).is_dir() else called
        references[part] = Reference(folder=place, sha256=files.digest((local / OWN_TENSORS).read_bytes()))
    gone = {key for part in references for key in known[part].values()}
    return {key: tensor for key, tensor in tensors.items() if key not in gone}, references


def put_back(expected: Mapping[str, Tensor], references: Mapping[str, tuple[Reference, Path]]) -> dict[str, Tensor]:
    """The tensors of all parts that are referred to, by their keys in the fusion.

    Raises CorruptFile where a part's file is another than it was.
    """
    known = keys(expected)
    found: dict[str, Tensor] = {}
    for part, (reference, local) in references.items():
        tensors = files.read_tensors(local / OWN_TENSORS)
        if files.digest((local / OWN_TENSORS).read_bytes()) != reference.sha256:
            raise CorruptFile(
                f"{local / OWN_TENSORS} is not the part '{part}' that the fusion was saved with: it has changed."
            )
        found |= {key: tensors[own] for own, key in known.get(part, {}).items() if own in tensors}
    return found
