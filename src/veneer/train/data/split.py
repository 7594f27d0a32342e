"""Which rows are held out, which repeat others, and which held-out rows training has seen."""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.train.data.kinds import Example

SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Key:
    """What an example asks and what it is, as hashes that do not see case and white space."""

    question: bytes
    content: bytes


def key(example: Example) -> Key:
    """The hashes of an example."""
    return Key(_hash(repr(example.question)), _hash(repr(example)))


def _hash(text: str) -> bytes:
    folded = SPACE.sub(" ", text.replace("\\n", " ").replace("\\t", " ")).casefold()
    return hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def held_out(keys: Sequence[Key], count: int, seed: int) -> set[int]:
    """`count` rows, so that what asks the same, or at least what is the same, stays on one side.

    Rows are taken in the order of their hashes: which ones does not depend on the order of the file, and most stay held
    out when others are added.
    """
    for sides in ([one.question for one in keys], [one.content for one in keys]):
        groups: defaultdict[bytes, list[int]] = defaultdict(list)
        for row, side in enumerate(sides):
            groups[side].append(row)
        taken: set[int] = set()
        for side in sorted(groups, key=lambda side: _seeded(side, seed)):
            if len(taken) + len(groups[side]) <= count:
                taken.update(groups[side])
        if len(taken) >= max(1, count // 2):
            return taken
    return set(random.Random(seed).sample(range(len(keys)), count))


def _seeded(side: bytes, seed: int) -> bytes:
    return hashlib.blake2b(side, digest_size=8, key=str(seed).encode()).digest()


def in_fraction(one: Key, fraction: float, seed: int) -> bool:
    """Whether a row of a stream is held out."""
    return int.from_bytes(_seeded(one.question, seed), "big") < fraction * 2**64


def repeated(keys: Sequence[Key], rows: Sequence[int], beside: Sequence[Key] = ()) -> list[int]:
    """Those of the rows that are the same as an earlier one, or as one of `beside`."""
    seen = {one.content for one in beside}
    found = []
    for row in rows:
        if keys[row].content in seen:
            found.append(row)
        seen.add(keys[row].content)
    return found


def leaked(train: Sequence[Key], held: Sequence[Key]) -> dict[str, int]:
    """How many held-out rows training has too: as they are, or with another answer to the same question."""
    contents, questions = {one.content for one in train}, {one.question for one in train}
    same = sum(one.content in contents for one in held)
    return {"same": same, "same_question": sum(one.question in questions for one in held) - same}
