"""Text files that are written whole or not at all, always in UTF-8, and names that UTF-8 has no place for."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from quickbloom.common.errors import ConfigError, QuickbloomError


@contextmanager
def whole(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file that takes the place of `path` when this ends without an exception; else `path` stays as it was.

    A link keeps its place, and what it leads to is replaced. A device or a pipe is written to as it is. What UTF-8 has no place
    for is written as an escape. Raises OSError.
    """
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline=newline) as file:
            yield file
        return
    place = Path(os.path.realpath(path))
    partial = place.with_name(f".{secrets.token_hex(8)}.partial")  # a name that nobody can have put there
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", newline=newline) as file:
            yield file
        if place.exists():
            partial.chmod(stat.S_IMODE(place.stat().st_mode))
        partial.replace(place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def shown(name: str) -> str:
    """A name that the system handed over, with an escape for every byte that is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace") if not is_text(name) else name


def is_text(name: str) -> bool:
    """Whether UTF-8 has a place for `name`: names of files may be any bytes, which Python keeps as halves of characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_name(what: str, name: str, error: type[QuickbloomError] = ConfigError) -> None:
    """Raise `error` for a name of a file or a folder that is not UTF-8. `what`: how the sentence begins."""
    if not is_text(name):
        raise error(f"{what} '{shown(name)}' has a name that is not UTF-8: rename it, such as with `convmv -t utf8`")
