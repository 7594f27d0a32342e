"""The command line as a person calls it, for the tests of its commands."""

from __future__ import annotations

import pytest

from veneer import cli


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `veneer WORDS`."""
    monkeypatch.setattr("sys.argv", ["veneer", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err
