"""The names that other programs rely on."""

import pytest

import veneer


def test_names_are_sorted():
    assert list(veneer.__all__) == sorted(veneer.__all__)


def test_names_are_unique():
    assert len(set(veneer.__all__)) == len(veneer.__all__)


@pytest.mark.parametrize("name", veneer.__all__)
def test_a_name_is_there_and_says_what_it_is(name):
    doc = getattr(veneer, name).__doc__
    assert doc
    assert not doc.startswith(f"{name}("), "this is the signature that dataclass() writes where there is no docstring"
