"""Every bench, one after another; what each prints goes into one page, bench/results/DATE-MACHINE.md.

A bench that fails or takes longer than --limit is named there with the end of what it said, and the rest go on; the
exit status is then 1. The page is written after each of them, so a run that is stopped leaves what it measured. Two
free cores take under two minutes for each; with --full, those that then measure less than they could measure all of it.
"""

import argparse
import ast
import datetime
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import machine

ROOT = Path(__file__).parents[1]
BENCHES = ROOT / "bench"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "torchao")
SMALLER = '"--full"'
"""What the source of a bench has that measures less where it is not asked for everything."""
LIMIT = 600
WIDTH = 160
SAID = 15
"""Lines of what a failed bench said last."""


@dataclass
class Ran:
    """How one bench went."""

    script: Path
    seconds: float
    printed: str
    failed: str
    """Why it failed, in a few words; empty where it did not."""

    @property
    def question(self) -> str:
        """The first line of its docstring."""
        return (ast.get_docstring(ast.parse(self.script.read_text())) or "").partition("\n")[0]


def scripts() -> dict[str, Path]:
    """The benches by name: what is beside them and runs nothing is not one."""
    found = sorted(BENCHES.glob("*.py"))
    return {script.stem: script for script in found if '__name__ == "__main__"' in script.read_text()}


def run(script: Path, full: bool, limit: float | None) -> Ran:
    """Run one bench in a process of its own."""
    command = [sys.executable, str(script)]
    if full and SMALLER in script.read_text():
        command.append("--full")
    started, why = time.monotonic(), ""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": str(WIDTH)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what it has started can be stopped with it
    )
    try:
        printed, said = process.communicate(timeout=limit)
    except BaseException as stopped:
        os.killpg(process.pid, signal.SIGKILL)
        printed, said = process.communicate()
        if not isinstance(stopped, subprocess.TimeoutExpired):
            raise
        why = f"stopped after {limit:g} s"
    if process.returncode and not why:
        why = f"exit status {process.returncode}"
    if why:
        printed = "\n".join([*printed.splitlines(), *said.splitlines()[-SAID:]])
    return Ran(script, time.monotonic() - started, printed.strip("\n"), why)


def page(done: Sequence[Ran], full: bool, load: str) -> str:
    """The results as Markdown: one table of all, then what each printed."""
    text = [
        f"# Benches on {machine.processor()}, {datetime.date.today().isoformat()}",
        "",
        f"`scripts/bench{' --full' if full else ''}`; {machine.words()};",
        f"Python {platform.python_version()}, {_versions()}.",
        f"Load (over one, five and fifteen minutes) {load} at the start, {_load()} at the end.",
        "",
        "| bench | seconds | |",
        "|---|---:|---|",
        *(
            f"| `{one.script.name}` | {one.seconds:.0f} | {f'failed: {one.failed}' if one.failed else ''} |"
            for one in done
        ),
    ]
    for one in done:
        text += ["", f"## {one.script.name}", "", one.question, "", "```text", one.printed, "```"]
    return "\n".join(text) + "\n"


def _versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _load() -> str:
    return ", ".join(f"{each:.1f}" for each in os.getloadavg())


def main() -> int:
    """Read the command line, and run what it names."""
    every = scripts()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="BENCH", help=f"some of {', '.join(every)}")
    parser.add_argument("--full", action="store_true", help="measure everything, however long it takes")
    parser.add_argument("--limit", type=float, help=f"seconds for one (default: {LIMIT}; with --full there is none)")
    parser.add_argument(
        "--machine", default=machine.short(), help="its name in that of the file (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=BENCHES / "results", help="where the page goes")
    asked = parser.parse_args()
    if unknown := sorted({*asked.names} - {*every}):
        parser.error(f"there is no bench {', '.join(unknown)} in bench/. There are: {', '.join(every)}")
    limit = asked.limit or (None if asked.full else LIMIT)
    to = asked.results / f"{datetime.date.today().isoformat()}-{asked.machine}.md"
    to.parent.mkdir(parents=True, exist_ok=True)
    load, done = _load(), []
    for name in asked.names or every:
        print(f"== {name}", flush=True)
        done.append(run(every[name], asked.full, limit))
        print(done[-1].printed, flush=True)
        to.write_text(page(done, asked.full, load), encoding="utf-8")
    for one in done:
        if one.failed:
            print(f"{one.script.name} failed: {one.failed}", file=sys.stderr)
    print(to)
    return int(any(one.failed for one in done))


if __name__ == "__main__":
    sys.exit(main())
