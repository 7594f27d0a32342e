"""Every method, every family, every law, but for the stated impossibilities, each of which is checked to be one.

The default run takes few of these cases, so many that every two of method, family and law meet, and each method's law
both holds and is stated where it does either; `scripts/matrix` runs them all, or `pytest -m ""` with a `-k` of yours.
"""

from __future__ import annotations

import laws
import pytest
import torch
from laws import FAMILIES, LAWS, Case
from pairwise import cover
from subjects import SUBJECTS

import veneer


def applies(law, family: str) -> bool:
    """Whether the law says anything here: nothing about text where there is none."""
    kind = FAMILIES[family]
    if law in (laws.generation_with_cache_equals_without, laws.static_cache_equals_dynamic):
        return kind.generates
    return bool(kind.pads) or law is not laws.padding_changes_nothing


def stated(law, name: str, family: str):
    """The error and its words by which Veneer says that the law cannot hold here, or None."""
    return SUBJECTS[name].stated(law.__name__, family)


def meetings(case):
    law, name, family = case
    return {(law, name, stated(*case) is None), (name, family), (law, family)}


ALL = [
    (law, name, family)
    for law in LAWS
    for name, subject in SUBJECTS.items()
    for family in subject.families
    if applies(law, family)
]
_CHOSEN = set(cover(ALL, meetings))
CASES = [
    pytest.param(
        *(law, name, family),
        id=f"{law.__name__}-{name}-{family}",
        marks=() if (law, name, family) in _CHOSEN else pytest.mark.matrix,
    )
    for law, name, family in ALL
]


@pytest.mark.parametrize(("law", "name", "family"), CASES)
def test_law(law, name, family, record_property):
    subject = SUBJECTS[name]
    case = Case(FAMILIES[family], subject.method, subject.where, subject.identity)
    impossible = stated(law, name, family)
    if impossible is None:
        law(case)
    else:
        kind, words = impossible
        with pytest.raises(kind, match=words) as raised:
            law(case)
        record_property("stated", f"{kind.__name__}: {raised.value}")


LEFT_OUT = [(name, family) for name, one in SUBJECTS.items() for family in FAMILIES if family not in one.families]


@pytest.mark.parametrize(("name", "family"), LEFT_OUT)
def test_a_family_left_out_has_no_place(name, family):
    model = FAMILIES[family].model()
    with pytest.raises(veneer.errors.VeneerError):
        veneer.attach(model, SUBJECTS[name].method, SUBJECTS[name].where)
    assert not veneer.adapters(model)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # inductor's import warns of itself
def test_compiled_code_equals_eager():
    laws.compiling_changes_nothing(Case(FAMILIES["llama"], SUBJECTS["LoRA"].method), backend="inductor")


@pytest.mark.parametrize("name", ["LoRA", "FullFineTuning", "Before", "Input", "KeyValue"])
def test_compiled_code_notices_attaching_and_detaching(name):
    """The same for all methods of a port, so one of each will do."""
    case = Case(FAMILIES["llama"], SUBJECTS[name].method)
    compiled = torch.compile(case.model, fullgraph=True, backend="eager")
    run = torch.no_grad()(lambda: compiled(**case.batch).logits)
    laws.same(run(), case.base, **laws.CLOSE)
    adapter = case.attach()
    laws.same(run(), case.answer(), **laws.CLOSE)
    laws.differs(run(), case.base)
    veneer.detach(case.model, adapter)
    laws.same(run(), case.base, **laws.CLOSE)
