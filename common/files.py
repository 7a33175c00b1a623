"""Text files in UTF-8, replaced atomically, and file names that are not valid UTF-8."""

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
    """Open a text file that replaces `path` if the block succeeds; on an exception `path` stays as it was.

    A symbolic link stays, and its target is replaced. A device or a pipe is written directly. Characters that
    UTF-8 cannot encode are written as escapes. Raises OSError.
    """
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline=newline) as file:
            yield file
        return
    place = Path(os.path.realpath(path))
    partial = place.with_name(f".{secrets.token_hex(8)}.partial")  # cannot be guessed, so nobody can plant a link there
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
    """Return a file name for display, with an escape for every byte that is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace") if not is_text(name) else name


def is_text(name: str) -> bool:
    """Return whether `name` is valid UTF-8. Python keeps other bytes of a file name as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_name(what: str, name: str, error: type[QuickbloomError] = ConfigError) -> None:
    """Raise `error` if the name of a file or folder is not UTF-8. `what` begins the message."""
    if not is_text(name):
        raise error(f"{what} '{shown(name)}' has a name that is not UTF-8: rename it, such as with `convmv -t utf8`")
