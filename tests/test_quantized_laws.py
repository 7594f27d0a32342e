"""The laws on quantized bases: every method, every way of quantizing, every law that says something there.

Law 15 holds every method on every base, and `test_laws.py` every method to every law. So the default run takes as many
of these cases as let every law meet every base, and every method some of both; the marker `matrix` has them all.
Merging and law 15 are in files of their own.
"""

from __future__ import annotations

import laws
import pytest
from laws import LAWS, Case
from pairwise import cover
from quantized import FAMILIES, KINDS, TORCHAO, base
from subjects import SUBJECTS
from test_quantized import eight_bit

ELSEWHERE = (laws.merged_equals_adapted, laws.meta_counts_the_same)
"""Merging gives dense weights, and a base is quantized on a device that holds numbers."""
MADE = [law for law in LAWS if law not in ELSEWHERE]


def applies(law, name: str, kind: str) -> bool:
    """Whether the base itself does what the law asks of the base with an adapter."""
    if SUBJECTS[name].stated("a_quantized_base_equals_its_dense_twin", FAMILIES[name]) is not None:
        return False
    if law in (laws.generation_with_cache_equals_without, laws.static_cache_equals_dynamic):
        return base(kind, FAMILIES[name]).generates
    return law is not laws.copies_and_pickles_work or kind not in TORCHAO


def meetings(case):
    law, name, kind = case
    return {(law, kind), name}


ALL = [(law, name, kind) for law in MADE for name in SUBJECTS for kind in KINDS if applies(law, name, kind)]
_CHOSEN = set(cover(ALL, meetings))
CASES = [
    pytest.param(
        *(law, name, kind),
        id=f"{law.__name__}-{name}-{kind}",
        marks=() if (law, name, kind) in _CHOSEN else pytest.mark.matrix,
    )
    for law, name, kind in ALL
]


@eight_bit
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache:UserWarning")
@pytest.mark.parametrize(("law", "name", "kind"), CASES)
def test_law(law, name, kind):
    subject, family = SUBJECTS[name], FAMILIES[name]
    case = Case(base(kind, family), subject.method, subject.where, subject.identity)
    impossible = subject.stated(law.__name__, family)
    if impossible is None:
        law(case)
    else:
        with pytest.raises(impossible[0], match=impossible[1]):
            law(case)
