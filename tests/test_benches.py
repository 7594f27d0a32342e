"""scripts/bench: what each bench prints is kept, and one that fails is named while the rest go on."""

import benches
import pytest

MAIN = '\nif __name__ == "__main__":\n    '
SCRIPTS = {
    "helper": '"""What benches share."""\n',
    "broken": '"""Does it break?"""\nimport sys' + MAIN + 'print("before")\n    sys.exit("no such model")\n',
    "quick": '"""Is it quick?\n\nMore."""\nimport sys'
    + MAIN
    + 'print("0.5 of the peer\'s", sys.argv[1:])  # "--full"\n',
    "slow": '"""Is it slow?"""\nimport time' + MAIN + 'print("began", flush=True)\n    time.sleep(60)\n',
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, source in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(benches, "BENCHES", tmp_path)
    return tmp_path


def called(monkeypatch, folder, *arguments):
    """The exit status, and the page."""
    monkeypatch.setattr("sys.argv", ["bench", "--results", str(folder), "--machine", "here", *arguments])
    status = benches.main()
    (page,) = folder.glob("*-here.md")
    return status, page.read_text()


def test_a_failing_bench_is_named_and_the_rest_go_on(folder, monkeypatch, capsys):
    status, page = called(monkeypatch, folder, "broken", "quick")
    assert status == 1
    assert "broken.py failed: exit status 1" in capsys.readouterr().err
    assert "| failed: exit status 1 |" in page
    assert "before\nno such model" in page
    assert "## quick.py\n\nIs it quick?\n\n```text\n0.5 of the peer's []\n```" in page


def test_all_sizes_are_asked_of_a_bench_that_has_them(folder, monkeypatch):
    status, page = called(monkeypatch, folder, "quick", "--full")
    assert status == 0
    assert "0.5 of the peer's ['--full']" in page


def test_a_bench_that_takes_too_long_is_stopped(folder, monkeypatch):
    status, page = called(monkeypatch, folder, "slow", "--limit", "3")
    assert status == 1
    assert "| failed: stopped after 3 s |" in page
    assert "began" in page


def test_an_unknown_bench_is_refused(folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        called(monkeypatch, folder, "helper")
    assert "There are: broken, quick, slow" in capsys.readouterr().err
