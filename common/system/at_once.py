"""How many tasks a worker computes at once: what its parent allows it, and what it was about when it ended."""

import os
from contextlib import suppress
from pathlib import Path

LIMIT = "QUICKBLOOM_AT_ONCE"
"""Environment variable: the most tasks that this process may compute at once."""
FILE = "QUICKBLOOM_AT_ONCE_FILE"
"""Environment variable: the file in which this process notes how many tasks it computes."""


def limit() -> int | None:
    """Return the most tasks that this process may compute at once; None: as many as its settings say."""
    return int(os.environ[LIMIT]) if LIMIT in os.environ else None


def note(tasks: int) -> None:
    """Note that this process computes so many tasks now, for whoever finds it dead."""
    if file := os.environ.get(FILE):
        with suppress(OSError):
            Path(file).write_text(str(tasks), encoding="utf-8")


def noted(file: Path) -> int:
    """Return the number that a process noted last in `file`; 0 if it noted none."""
    with suppress(OSError, ValueError):
        return int(file.read_text(encoding="utf-8"))
    return 0
