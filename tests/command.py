"""The command line as a person calls it, for the tests of its commands."""

from __future__ import annotations

import pytest

from veneer import cli


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of `veneer WORDS`."""
    monkeypatch.setattr("sys.argv", ["veneer", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `veneer WORDS`."""
    code = call(monkeypatch, *words)
    return code, *capsys.readouterr()
