"""Every method, every law, every family: runs them all and keeps what came out, with machine and versions.

Writes bench/results/laws-DATE.json (each method's and law's families: held, stated with what Veneer said, failed) and
the same as a table, laws-DATE.md. Fails where a law failed.
"""

import datetime
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import law_page
import machine
import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("veneer", "torch", "transformers")


class Recorder:
    """A pytest plugin that keeps how each case came out."""

    def __init__(self) -> None:
        self.reports: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A case has run, or its preparation failed."""
        if report.when == "call" or report.failed:
            self.reports.append(report)


def gather(outcomes: Sequence[tuple[tuple[str, str, str], pytest.TestReport]]) -> dict[str, Any]:
    """By method and law: the families where it held, those where it is stated why not, those where it failed."""
    methods: dict[str, Any] = {}
    for (law, method, family), report in outcomes:
        cell = methods.setdefault(method, {}).setdefault(law, {"held": [], "stated": {}, "failed": []})
        said = dict(report.user_properties).get("stated")
        if report.failed:
            cell["failed"].append(family)
        elif said:
            cell["stated"][family] = said
        else:
            cell["held"].append(family)
    return methods


def text(result: dict[str, Any]) -> str:
    """The result as Markdown: one table of methods and laws, then the reasons."""
    laws = list(dict.fromkeys(law for cells in result["methods"].values() for law in cells))
    numbers = {law: str(i) for i, law in enumerate(laws, 1)}
    rows, reasons = [], []
    for method, cells in result["methods"].items():
        rows.append((method, *(_cell(cells.get(law)) for law in laws)))
        for law, cell in cells.items():
            if cell["stated"]:
                said = next(iter(cell["stated"].values()))
                reasons.append((method, law_page.in_words(law), ", ".join(cell["stated"]), said))
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    parts = [
        f"# The laws, {result['date']}",
        f"{result['cases']} cases in {result['seconds']:.0f} s of tests. {result['machine']}; {versions}.",
        "A cell counts the families on which the law held; `+ n` is stated to be impossible on n more, with an error "
        "that the test saw. A dash: the law says nothing there.",
        law_page.table(("method", *numbers.values()), rows),
        law_page.table(("", "law"), [(number, law_page.in_words(law)) for law, number in numbers.items()]),
        "## What is stated",
        law_page.table(("method", "law", "on", "what Veneer says (on the first)"), reasons),
    ]
    return "\n\n".join(parts) + "\n"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    if cell["failed"]:
        return f"FAILED on {', '.join(cell['failed'])}"
    return f"{len(cell['held'])}" + (f" + {len(cell['stated'])}" if cell["stated"] else "")


def main(arguments: Sequence[str]) -> int:
    """Runs the matrix and writes the two files."""
    recorder = Recorder()
    selection = [str(ROOT / "tests" / "test_laws.py"), "-m", "", "-k", "test_law", "-q", "--no-header"]
    code = pytest.main([*selection, *arguments], plugins=[recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)
    from test_laws import CASES

    found = {report.nodeid.partition("[")[2].removesuffix("]"): report for report in recorder.reports}
    cases = {case.id: (case.values[0].__name__, *case.values[1:]) for case in CASES}
    outcomes = [(case, found[key]) for key, case in cases.items() if key in found]
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.words(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "cases": len(outcomes),
        "seconds": round(sum(report.duration for _, report in outcomes), 1),
        "methods": gather(outcomes),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"laws-{result['date']}"
    file.with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(text(result), encoding="utf-8")
    print(f"Read {file.with_suffix('.md').relative_to(ROOT)}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
