"""Shared by all commands: exit codes, output streams, error messages."""

import sys

from rich.console import Console

from quickbloom.common.printable import one_line

OK, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 130
_WIDE = 200
"""Columns of a table that is written to a file or a pipe."""

console = Console(stderr=True, highlight=False, emoji=False)
"""Console on stderr, for progress and everything that is not a result."""


def paper() -> Console:
    """Return a console on stdout, for results."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, emoji=False)


def say(line: str) -> None:
    """Print one line of progress. It is never read as markup, since parts may come from nodes or file names."""
    console.print(one_line(line), markup=False, soft_wrap=True)


def say_error(sentence: str) -> None:
    """Print one sentence that says what went wrong."""
    console.print("error:", style="bold red", end=" ")
    console.print(one_line(sentence), markup=False, soft_wrap=True)
