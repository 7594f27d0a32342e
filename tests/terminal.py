"""A program in a real terminal, which tmux emulates: what a person would see there, and what they type."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path


class Terminal:
    """`python -m veneer WORDS` on a screen of its own, so that tests can run side by side."""

    def __init__(self, folder: Path, *words: object, columns: int = 100) -> None:
        self.socket = folder / "tmux"  # in a short folder: a socket's path holds some hundred bytes
        command = shlex.join([sys.executable, "-W", "ignore", "-m", "veneer", *map(str, words)])
        # a shell stays behind to tell the exit code: tmux 3.3 sometimes never learns it
        self._tmux(
            "-f", "/dev/null", "new-session", "-d", "-x", columns, "-y", 40,
            f"trap : INT; {command}; echo ended with $?; exec cat",
        )  # fmt: skip

    def _tmux(self, *words: object) -> str:
        command = ["tmux", "-S", str(self.socket), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def screen(self) -> str:
        """All lines that were shown, those above the screen too, as they look now."""
        return self._tmux("capture-pane", "-p", "-S", "-")

    def until(self, pattern: str, seconds: float = 300) -> re.Match[str]:
        """Wait until the pattern is there to see; fails where the program ends or the time does before it is."""
        deadline = time.monotonic() + seconds
        while True:
            over = self.code() is not None or time.monotonic() > deadline
            if found := re.search(pattern, self.screen()):
                return found
            assert not over, f"{pattern!r} was never seen in:\n{self.screen().strip()}"
            time.sleep(0.05)

    def type(self, line: str) -> None:
        """Type a line and Enter."""
        self._tmux("send-keys", "-l", line)
        self.press("Enter")

    def press(self, key: str) -> None:
        """Press a key by tmux's name for it: C-c, Up."""
        self._tmux("send-keys", key)

    def code(self) -> int | None:
        """The exit code, or None while the program runs."""
        found = re.search(r"^ended with (\d+)$", self.screen(), re.MULTILINE)
        return int(found[1]) if found else None

    def ended(self, seconds: float = 300) -> int:
        """Wait for the exit code."""
        deadline = time.monotonic() + seconds
        while (code := self.code()) is None:
            assert time.monotonic() < deadline, f"it never ended:\n{self.screen().strip()}"
            time.sleep(0.05)
        return code

    def close(self) -> None:
        """End the program, if it runs, and its terminal."""
        self._tmux("kill-server")
