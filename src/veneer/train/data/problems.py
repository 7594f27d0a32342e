"""Mistakes in rows, collected so that all are said at once."""

from __future__ import annotations

from veneer.errors import DataError
from veneer.train.data import sources


class Problems:
    """What is wrong with which rows; alike ones are said once."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, where: str, what: str) -> None:
        """One more; DataError when there are too many to go on."""
        self.found.setdefault(what, []).append(where)
        if len(self.found) >= sources.MOST:
            self.raise_any("Reading stopped here.")

    def raise_any(self, last: str = "") -> None:
        """DataError if there are any."""
        if self.found:
            lines = [
                f"{rows[0]}{f' and {len(rows) - 1:,} other rows' if len(rows) > 1 else ''}: {what}"
                for what, rows in self.found.items()
            ]
            raise DataError("\n".join([*lines, last] if last else lines))
