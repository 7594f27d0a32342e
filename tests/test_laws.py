"""Every method, every family, every law, but for the stated impossibilities, each of which is checked to be one."""

from __future__ import annotations

import laws
import pytest
from laws import FAMILIES, LAWS, Case
from subjects import SUBJECTS


def applies(law, family: str) -> bool:
    """Whether the law says anything here: nothing about text where there is none."""
    kind = FAMILIES[family]
    if law in (laws.generation_with_cache_equals_without, laws.static_cache_equals_dynamic):
        return kind.generates
    return bool(kind.pads) or law is not laws.padding_changes_nothing


CASES = [
    pytest.param(law, name, family, id=f"{law.__name__}-{name}-{family}")
    for law in LAWS
    for name, subject in SUBJECTS.items()
    for family in subject.families
    if applies(law, family)
]


@pytest.mark.parametrize(("law", "name", "family"), CASES)
def test_law(law, name, family):
    subject = SUBJECTS[name]
    case = Case(FAMILIES[family], subject.method, subject.where, subject.identity)
    stated = subject.stated(law.__name__, family)
    if stated is None:
        law(case)
    else:
        kind, words = stated
        with pytest.raises(kind, match=words):
            law(case)


def test_compiled_code_equals_eager():
    laws.compiling_changes_nothing(Case(FAMILIES["llama"], SUBJECTS["LoRA"].method), backend="inductor")
