"""What a telephone exchange says: 500 recordings of Allison Smith and their words, 8 kHz (CC BY-SA 3.0).

They are Asterisk's core sounds, "Please enter your password followed by the pound key." and the like, numbers and
letters, and come as packages of Debian's, from which they are unpacked without being installed.

Many say almost the same. Recordings are held out by their words: those that say the same are on one side, and what
shares half of its sequences of four words with one that is held out is left out of training.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import MissingSample
from veneer.samples import whole

PINS = ("asterisk-core-sounds-en=1.6.1-1", "asterisk-core-sounds-en-wav=1.6.1-1")
WORDS = "core-sounds-en.txt.gz"
VOICE = "/en_US_f_Allison/"
HELD_OUT = 80
WINDOW = 30 * 8000 * 2
"""Bytes of sound that Whisper hears at once: 30 seconds of 16 bits, 8,000 a second. Longer recordings are left out."""

LENGTH = 4
SHARE = 0.5


@dataclass(frozen=True)
class Prompt:
    """One recording, by its path below `folder()`, and what is said."""

    file: str
    text: str


def folder() -> Path:
    """The recordings, and `train.jsonl` and `held-out.jsonl` beside them, fetched and unpacked on first use."""
    return whole.cached("asterisk-core-sounds-en-1.6.1", _fill)


def prompts(lines: Iterable[str]) -> Iterator[Prompt]:
    """What is said in words, of the table of all sounds: `name: text` a line."""
    for line in lines:
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";") and (said := sentence(text)):
            yield Prompt(f"{name.strip()}.wav", said)


def sentence(text: str) -> str:
    """Without remarks on tones and signs, and with a capital and a full stop, as Whisper writes; "" for a mere tone."""
    words = " ".join(re.sub(r"\[.*?\]|\(.*?\)|<.*?>|\.\.\.", " ", text).split())
    if not words:
        return ""
    return words[0].upper() + words[1:] + ("" if words[-1] in ".?!" else ".")


def split(found: Iterable[Prompt], held_out: int = HELD_OUT, seed: int = 0) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) recordings; none of the first says what one of the second does."""
    every = list(found)
    texts = sorted({_plain(prompt.text) for prompt in every})
    chosen = frozenset(random.Random(seed).sample(texts, held_out))
    judged = [prompt for prompt in every if _plain(prompt.text) in chosen]
    known = set().union(*(_sequences(text) for text in chosen))
    rest = (prompt for prompt in every if _plain(prompt.text) not in chosen)
    return [prompt for prompt in rest if _share(_plain(prompt.text), known) < SHARE], judged


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def _sequences(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[start : start + LENGTH]) for start in range(len(words) - LENGTH + 1)}


def _share(text: str, known: set[str]) -> float:
    """Of the sequences of a text, how many are known; a text too short for one has none."""
    found = _sequences(text)
    return len(found & known) / len(found) if found else 0.0


def _fill(folder: Path) -> None:
    words = ""
    for pin in PINS:
        for name, content in _files(pin):
            if name.endswith(WORDS):
                words = gzip.decompress(content).decode()
            elif VOICE in name:
                place = folder / name.partition(VOICE)[2]
                place.parent.mkdir(exist_ok=True)
                place.write_bytes(content)
    there = (prompt for prompt in prompts(words.splitlines()) if _fits(folder / prompt.file))
    for file, part in zip(("train.jsonl", "held-out.jsonl"), split(there), strict=True):
        # Whisper's texts begin with a space
        rows = (json.dumps({"audio": prompt.file, "text": f" {prompt.text}"}) + "\n" for prompt in part)
        (folder / file).write_text("".join(rows), encoding="utf-8")


def _fits(recording: Path) -> bool:
    return recording.is_file() and recording.stat().st_size <= WINDOW


def _files(pin: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a package of Debian's."""
    if shutil.which("apt-get") is None:
        raise MissingSample(f"{pin} is a package of Debian's, and this machine has no apt-get to fetch it with.")
    with tempfile.TemporaryDirectory() as scratch:
        _done(["apt-get", "download", "-qq", pin], pin, scratch)
        (package,) = Path(scratch).glob("*.deb")
        content = _done(["dpkg-deb", "--fsys-tarfile", package.name], pin, scratch)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            if member.isfile() and (file := tar.extractfile(member)):
                yield member.name, file.read()


def _done(command: list[str], pin: str, folder: str) -> bytes:
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise MissingSample(f"{pin} could not be fetched: {reason} Debian's lists are brought up by: apt-get update")
    return done.stdout
