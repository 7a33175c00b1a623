"""Directories that must be writable: a check of TMPDIR, short paths for sockets, folders to make."""

import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from quickbloom.common.errors import ConfigError

LONGEST_SOCKET = 104 if sys.platform == "darwin" else 107
"""Longest path of a Unix socket, in bytes."""
_ROOM = 2**20
"""Required free space, in bytes."""
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def check() -> None:
    """Raise ConfigError if no file can be written to the directory for temporary files."""
    given = os.environ.get("TMPDIR")
    try:
        _write_into(given or tempfile.gettempdir())
    except OSError as error:
        reason = error.strerror or str(error)
        if given:
            raise ConfigError(
                f"`TMPDIR` must be a directory that can be written and has some room, got '{given}' ({reason}): make it, free "
                "some space there, or name another one"
            ) from None
        raise ConfigError(
            f"there is no directory for temporary files ({reason}): name one in the environment variable `TMPDIR`"
        ) from None


def absolute(environ: Mapping[str, str]) -> dict[str, str]:
    """Return TMPDIR as an absolute path, for processes in other directories; {} if it is not set."""
    return {"TMPDIR": os.path.abspath(given)} if (given := environ.get("TMPDIR")) else {}  # noqa: PTH100 - links stay


def short(longest: int) -> str:
    """Return a directory for temporary files with a path of at most `longest` bytes. Raises ConfigError if there is none."""
    for directory in (tempfile.gettempdir(), *_SHORT, str(Path.home())):
        if len(os.fsencode(directory)) <= longest:
            with suppress(OSError):
                _write_into(directory)
                return directory
    raise ConfigError(
        f"Unix sockets need a directory for temporary files whose path has at most {longest} bytes, and none of "
        f"{', '.join(_SHORT)} can be written: name a shorter one in the environment variable `TMPDIR`"
    )


def make_writable(directory: Path) -> None:
    """Make a directory if need be. Raises OSError unless this user can write files to it."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def _write_into(directory: str) -> None:
    """Raise OSError unless a file of `_ROOM` bytes fits in `directory`."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(_ROOM))
