"""The choice of few cases that touch what all touch."""

from __future__ import annotations

import itertools

import pytest
from pairwise import cover


def pairs(case):
    return {(i, j, case[i], case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


@pytest.mark.parametrize("sizes", [(3, 3, 3), (4, 5, 2), (25, 15, 9), (1, 1, 1)])
def test_every_pair_is_touched(sizes):
    cases = list(itertools.product(*map(range, sizes)))
    chosen = cover(cases, pairs)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, cases))
    largest = sorted(sizes)[-2:]
    assert largest[0] * largest[1] <= len(chosen) <= 1.2 * largest[0] * largest[1]


def test_what_no_case_has_is_not_asked_for():
    cases = [case for case in itertools.product(range(3), repeat=3) if case[0] != case[1]]
    chosen = cover(cases, pairs)
    assert set(chosen) <= set(cases)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, cases))


def test_the_choice_is_greedy_and_keeps_the_order():
    assert cover(["ab", "abc", "cd", "d"], set) == ["abc", "cd"]
    assert cover(["d", "ab", "cd", "abc"], set) == ["d", "abc"]
    assert cover([], set) == []
