"""Folders and files of this user alone, for what is run or loaded later: nobody else can put something in their place."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


def folder(name: str) -> Path:
    """The folder `name` in the user's cache, or where that cannot be written one for temporary files; for its owner alone.

    Raises OSError where others could put something there.
    """
    for place in _places(name):
        with contextlib.suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_ours(place) and os.access(place, os.W_OK):
                return place
    raise OSError(f"no folder that is this user's alone for {name}")


def is_ours(place: Path) -> bool:
    """Whether a folder, which is no link, is this user's, and nobody else can write to it or take it away."""
    status = place.lstat()  # not of what a link leads to
    if not hasattr(os, "getuid"):  # Windows, where a user's own folders are closed to others
        return stat.S_ISDIR(status.st_mode)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return False
    return all(_is_kept(above.stat()) for above in place.resolve().parents)


def _is_kept(status: os.stat_result) -> bool:
    """Whether entries of a folder can be renamed by nobody but their owner, its owner and its group."""
    trusted = status.st_uid in (0, os.getuid())
    return trusted and (not status.st_mode & 0o002 or bool(status.st_mode & stat.S_ISVTX))


def write_text(file: Path, text: str) -> None:
    """Write a text file that nobody else can read, whole or not at all. Raises OSError."""
    partial = file.with_suffix(".partial")
    try:
        partial.unlink(missing_ok=True)  # of a process that was killed, or a link that somebody has put there
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
            opened.write(text)
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _places(name: str) -> Iterator[Path]:
    with contextlib.suppress(RuntimeError):  # there are users without a home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quickbloom" / name
    if hasattr(os, "getuid"):  # without, one for temporary files is the user's own already
        yield Path(tempfile.gettempdir()) / f"quickbloom-{name}-{os.getuid()}"
