"""Private folders for what is later executed or loaded: nobody else can replace it."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


def folder(name: str) -> Path:
    """Return the folder `name` in the user's cache, or in the temporary directory if that is not writable; owner only.

    Raises OSError if others could write to both.
    """
    for place in _places(name):
        with contextlib.suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_ours(place) and os.access(place, os.W_OK):
                return place
    raise OSError(f"no folder that is this user's alone for {name}")


def is_ours(place: Path) -> bool:
    """Return whether `place` is a folder, not a link, that only this user can write to, move or replace."""
    status = place.lstat()  # does not follow a link
    if not hasattr(os, "getuid"):  # Windows, where a user's own folders are closed to others
        return stat.S_ISDIR(status.st_mode)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return False
    return all(_is_kept(above.stat()) for above in place.resolve().parents)


def _is_kept(status: os.stat_result) -> bool:
    """Return whether others are unable to rename the entries of a folder, except for its owner and group."""
    trusted = status.st_uid in (0, os.getuid())
    return trusted and (not status.st_mode & 0o002 or bool(status.st_mode & stat.S_ISVTX))


def _places(name: str) -> Iterator[Path]:
    with contextlib.suppress(RuntimeError):  # some users have no home directory
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quickbloom" / name
    if hasattr(os, "getuid"):  # without, one for temporary files is the user's own already
        yield Path(tempfile.gettempdir()) / f"quickbloom-{name}-{os.getuid()}"
