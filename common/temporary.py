"""Directories for temporary files: whether the one that TMPDIR names can be used, and short ones for sockets."""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import ConfigError

LONGEST_SOCKET = 104 if sys.platform == "darwin" else 107
"""Bytes that the path of a Unix socket can have."""
_ROOM = 2**20
"""Bytes that must be free."""
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def check() -> None:
    """Raise ConfigError where no file can be written into the directory for temporary files."""
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
    """TMPDIR for processes that run in other directories, if it is set."""
    return {"TMPDIR": os.path.abspath(given)} if (given := environ.get("TMPDIR")) else {}  # noqa: PTH100 - links stay


@contextmanager
def short(longest: int) -> Iterator[Path]:
    """A private directory with a path of at most `longest` bytes, as long as this lasts. Raises ConfigError."""
    for base in (tempfile.gettempdir(), *_SHORT, str(Path.home())):
        with suppress(OSError):
            _write_into(base)
            directory = tempfile.TemporaryDirectory(prefix="qb-", dir=base, ignore_cleanup_errors=True)
            if len(os.fsencode(directory.name)) <= longest:
                break
            directory.cleanup()
    else:
        raise ConfigError(
            f"Unix sockets need a directory for temporary files whose path has at most {longest - len('/qb-') - 8} bytes, and "
            f"none of {', '.join(_SHORT)} can be written: name a shorter one in the environment variable `TMPDIR`"
        )
    with directory as name:
        yield Path(name)


def _write_into(directory: str) -> None:
    """Raise OSError unless a file fits in there."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(_ROOM))
