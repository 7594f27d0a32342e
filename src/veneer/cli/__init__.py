"""The command line: parse, call a verb, print.

Exit code 0: done; 2: a mistake to mend, said in one sentence; 130: stopped by a signal, after saving.
"""

from __future__ import annotations

import logging
import signal
import sys

from veneer.environment import spare_memory
from veneer.errors import Stopped, VeneerError

TALKATIVE = "bitsandbytes", "torchao", "torch.utils._pytree"
"""What warns while it is imported, of kernels that nobody asked for and of how others use it."""


def main() -> None:
    """Run the `veneer` command; a user's mistake is one sentence on standard error and exit code 2."""
    spare_memory()  # before anything makes a tensor
    from veneer.cli import choose, compare, data, export, plan, train  # noqa: F401  # they register their commands
    from veneer.cli.commands import app

    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except VeneerError as error:
        print(f"veneer: {error}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT if isinstance(error, Stopped) else 2)
