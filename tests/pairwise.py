"""Few cases that together touch what all of them touch: a covering array, chosen greedily."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")


def cover(cases: Sequence[T], touches: Callable[[T], Collection[Hashable]]) -> list[T]:
    """The cases, in their order, that a greedy choice takes to touch everything that any of the cases touches.

    Each step takes the first case that touches most of what is left. What a case would add only shrinks as others are
    taken, so one pass over the cases for each number of additions, the largest first, makes the same choice.
    """
    touched = [frozenset(touches(case)) for case in cases]
    done: set[Hashable] = set()
    taken: set[int] = set()
    for wanted in range(max(map(len, touched), default=0), 0, -1):
        for i, mine in enumerate(touched):
            if len(mine - done) == wanted:
                done |= mine
                taken.add(i)
    return [case for i, case in enumerate(cases) if i in taken]
