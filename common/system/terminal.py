"""What the commands have in common: exit codes, where they write, how they tell of an error."""

import sys

from rich.console import Console

from quickbloom.common.printable import one_line

OK, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 130
_WIDE = 200
"""Columns of a table that goes into a file or a pipe."""

console = Console(stderr=True, highlight=False, emoji=False)
"""For progress and everything else that is no result."""


def paper() -> Console:
    """For results, on stdout."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, emoji=False)


def say(line: str) -> None:
    """One line of progress; never as markup: parts of it may come from nodes or from file names."""
    console.print(one_line(line), markup=False, soft_wrap=True)


def say_error(sentence: str) -> None:
    """One sentence on what went wrong."""
    console.print("error:", style="bold red", end=" ")
    console.print(one_line(sentence), markup=False, soft_wrap=True)
