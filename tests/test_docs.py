"""The generators of docs/: what they make of good docstrings, what they say of bad ones, and that laws.md is theirs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import law_page
import method_pages
import pytest

from veneer import methods

GOOD = """Scales each output.

    A second paragraph.

    Formula:
        y = scale * W x
          + 0
    Shapes:
        W: (out, in)
    Defaults:
        scale: what each output
            is multiplied by
        Other words stay.
    Cost:
        One number.
    Merging:
        Into W.
    Errors:
        None.
    Paper:
        A paper, 2020.
    Example:
        Scale(scale=2.0)
    """


def scale_class(docstring):
    @dataclass(frozen=True)
    class Scale:
        scale: float = 1.0
        names: tuple[str, ...] = field(default_factory=tuple)
        kind: str | None = None
        spots: Mapping[str, Annotated[int, "at least 1"]] = field(default_factory=dict)
        init: Literal["a.b", "c"] = "c"

    Scale.__doc__ = docstring
    return Scale


def test_a_good_docstring_becomes_a_page():
    page = method_pages.page(scale_class(GOOD))
    assert page.startswith("# Scale\n\nScales each output.\n\nA second paragraph.\n\n## Formula\n")
    assert "```text\ny = scale * W x\n  + 0\n```" in page
    assert "```python\nScale(scale=2.0)\n```" in page
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == list(method_pages.SECTIONS)


def test_options_are_a_table():
    page = method_pages.page(scale_class(GOOD))
    assert "| option | type | default | meaning |" in page
    assert "| `scale` | `float` | `1.0` | what each output is multiplied by |" in page
    assert "| `names` | `tuple[str, ...]` | `()` |  |" in page
    assert "| `spots` | `Mapping[str, int]` | `{}` |  |" in page
    assert "| `init` | `Literal['a.b', 'c']` | `'c'` |  |" in page
    assert r"| `kind` | `str \| None` | `None` |  |" in page
    assert "|\n\nOther words stay.\n\n## Cost" in page


@pytest.mark.parametrize("section", method_pages.SECTIONS)
def test_a_missing_section_is_named(section):
    bad = scale_class(GOOD.replace(f"    {section}:\n", ""))
    with pytest.raises(method_pages.DocstringError, match=f"^Scale: no section '{section}:' alone on a line$"):
        method_pages.page(bad)


def test_an_empty_section_is_named():
    with pytest.raises(method_pages.DocstringError, match=r"^Scale: section 'Cost:' is empty$"):
        method_pages.page(scale_class(GOOD.replace("        One number.\n", "")))


def test_an_unknown_section_is_refused():
    with pytest.raises(method_pages.DocstringError, match=r"^Scale: section 'Cost:' has a line that is not indented"):
        method_pages.page(scale_class(GOOD.replace("    Merging:", "    Notes:\n        x\n    Merging:")))


def test_no_docstring_lacks_everything():
    with pytest.raises(method_pages.DocstringError) as caught:
        method_pages.page(scale_class(None))
    assert len(str(caught.value).splitlines()) == 1 + len(method_pages.SECTIONS)


def test_one_bad_method_leaves_the_old_pages(tmp_path):
    folder = tmp_path / "methods"
    method_pages.write([scale_class(GOOD)], folder)
    assert sorted(path.name for path in folder.iterdir()) == ["Scale.md", "index.md"]
    assert "| [Scale](Scale.md) | Scales each output. |" in (folder / "index.md").read_text()
    with pytest.raises(method_pages.DocstringError):
        method_pages.write([scale_class("Bad.")], folder)
    assert sorted(path.name for path in folder.iterdir()) == ["Scale.md", "index.md"]


def test_main_says_what_is_missing_and_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(method_pages, "public_methods", lambda: [scale_class("Bad."), scale_class(GOOD)])
    monkeypatch.setattr(method_pages, "FOLDER", tmp_path / "methods")
    assert method_pages.main() == 1
    assert "Scale: no section 'Formula:' alone on a line\n" in capsys.readouterr().err
    assert not (tmp_path / "methods").exists()


@pytest.mark.parametrize("method", method_pages.public_methods(), ids=lambda method: method.__name__)
def test_every_method_has_a_page(method):
    assert method_pages.page(method)


def test_every_method_is_one_short_file():
    lines = {path.name: path.read_text().count("\n") for path in Path(methods.__file__).parent.glob("*.py")}
    assert len(lines) > 20
    assert {name: count for name, count in lines.items() if count >= 100} == {}


def test_the_page_of_laws_is_up_to_date():
    assert law_page.PAGE.read_text(encoding="utf-8") == law_page.page(), "run scripts/law_page.py"


def test_every_stated_impossibility_is_one_of_a_law():
    laws = law_page.sentences()
    for name, subject in law_page.shipped().items():
        assert set(subject.impossible) <= set(laws), name
