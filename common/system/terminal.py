"""Shared by all commands: exit codes, output streams, error messages."""

import logging
import sys
from collections.abc import Callable

from rich.console import Console

from quickbloom.common.printable import one_line

OK, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 130
_WIDE = 200
"""Columns of a table that is written to a file or a pipe."""

console = Console(stderr=True, highlight=False, emoji=False)
"""Console on stderr, for progress and everything that is not a result."""


_log: Callable[[str, int], bool] | None = None
"""Takes every line, with its level; returns whether it is not to be shown here."""


def hand_to(log: Callable[[str, int], bool] | None) -> None:
    """Hand every line to a log as well; None: no more. It returns whether it is not to be shown here."""
    global _log
    _log = log


def taken(line: str, level: int = logging.INFO) -> bool:
    """Hand a line to the log, if there is one; return whether it is not to be shown here."""
    return _log is not None and _log(line, level)


def paper() -> Console:
    """Return a console on stdout, for results."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, emoji=False)


def say(line: str) -> None:
    """Print one line of progress. It is never read as markup, since parts may come from nodes or file names."""
    if not taken(line):
        show(line)


def show(line: str) -> None:
    """Print one line without handing it to the log."""
    console.print(one_line(line), markup=False, soft_wrap=True)


def say_error(sentence: str) -> None:
    """Print one sentence that says what went wrong."""
    if taken(sentence, logging.ERROR):
        return
    console.print("error:", style="bold red", end=" ")
    console.print(one_line(sentence), markup=False, soft_wrap=True)
