"""File names that are not valid UTF-8."""

import os
from pathlib import Path

from quickbloom.common.errors import ConfigError, QuickbloomError


def shown(path: str | Path) -> str:
    """Return the name of a file for display, with an escape for every byte that is not UTF-8: "caf\\xe9"."""
    name = str(path)
    return name if is_text(name) else os.fsencode(name).decode("utf-8", "backslashreplace")


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
