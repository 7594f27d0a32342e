"""Sentences of film reviews with the mean rating that people gave them: positive or negative (MIT).

They come with the paper of Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM 2014, inside the source archive of its package, which is fetched once and cached.
"""

from __future__ import annotations

import io
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

from veneer.samples import packages, whole

PIN = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CLEAR = 0.5
"""Sentences that people rated within this of neutral, on -4 to 4, have no clear sentiment and are left out."""


@dataclass(frozen=True)
class Sentence:
    """One sentence and whether people found it positive."""

    text: str
    positive: bool


def load(held_out: int, seed: int = 0) -> tuple[list[Sentence], list[Sentence]]:
    """(training, held-out) sentences, shuffled; a sentence that occurs twice is in one of them only."""
    lines = (whole.cached("vadersentiment-3.3.2", _fetch) / "reviews.tsv").read_text(encoding="utf-8").splitlines()
    ratings = {text: float(rating) for _, rating, text in (line.split("\t", 2) for line in lines)}
    found = [Sentence(text, rating > 0) for text, rating in ratings.items() if abs(rating) > CLEAR]
    random.Random(seed).shuffle(found)
    return found[held_out:], found[:held_out]


def _fetch(folder: Path) -> None:
    with packages.archive(PIN, "--no-binary", ":all:") as source:
        outer = _member(source.read_bytes(), ARCHIVE)
    (folder / "reviews.tsv").write_bytes(_member(outer, TABLE))


def _member(archive: bytes, name: str) -> bytes:
    """One file of a gzipped archive, read and nothing else unpacked."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        found = tar.extractfile(name)
        assert found is not None, f"{name} is a folder"
        return found.read()
