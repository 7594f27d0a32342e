"""`python -m veneer` is the `veneer` command."""

from veneer.cli import main

main()
