"""The ALBERT inside RXNMapper: a real masked language model of chemical reactions, 735,567 parameters (MIT).

Its twelve layers share one set of weights, which makes it a good test of modules that run more than once. The weights
come as a pickle, which is read with `weights_only=True`, so that nothing in it can run, and cached as safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from transformers import AlbertConfig, AlbertForMaskedLM

from veneer.samples import packages, whole
from veneer.seams.quiet import quiet

PACKAGE = "rxnmapper"
FOLDER = "models/transformers/albert_heads_8_uspto_all_1310k"
POOLER = {"albert.pooler.weight", "albert.pooler.bias"}  # in the file, but a masked language model has none


def folder() -> Path:
    """The model as a plain transformers folder with `vocab.txt` beside it, converted on first use."""
    return whole.cached("rxnmapper-albert-0.4.3", _convert)


def load() -> AlbertForMaskedLM:
    """The model in float32, ready for inference."""
    with quiet():
        return cast(AlbertForMaskedLM, AlbertForMaskedLM.from_pretrained(folder(), local_files_only=True).eval())


def vocabulary() -> dict[str, int]:
    """Token -> id; a token is an atom, a bond or another symbol of a SMILES string."""
    lines = (folder() / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return {token: index for index, token in enumerate(lines)}


def _convert(folder: Path) -> None:
    source = packages.file(PACKAGE, FOLDER)
    weights = torch.load(source / "pytorch_model.bin", weights_only=True, map_location="cpu")
    with quiet():
        model = AlbertForMaskedLM(AlbertConfig.from_pretrained(source))
        model.load_state_dict({name: weight for name, weight in weights.items() if name not in POOLER})
        model.save_pretrained(folder)
    (folder / "vocab.txt").write_bytes((source / "vocab.txt").read_bytes())
