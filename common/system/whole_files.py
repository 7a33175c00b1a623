"""Files that appear whole or not at all: written beside their place, then moved over what is there.

After a crash, a full disk or an error in between, the old file is as it was.
"""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import GzipFile
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, TextIO, cast


@contextmanager
def replacing(path: Path, partial: Path | None = None, *, mode: int | None = None, wait: bool = False) -> Iterator[Path]:
    """Yield where to write the new `path`: it takes its place if the block succeeds, and is removed if not.

    `partial`: where that is, in the same file system; by default `path` with the suffix ".partial". `mode`: permissions of
    the new file, whatever the umask; None: as it was written. `wait`: go on only once it is on the disk. Raises OSError.
    """
    partial = path.with_suffix(".partial") if partial is None else partial
    partial.unlink(missing_ok=True)  # left by a killed process, or a link planted by somebody else
    try:
        yield partial
        if mode is not None:
            partial.chmod(mode)
        if wait:
            _sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if wait:
        _sync(path.parent)


@contextmanager
def whole(path: Path, newline: str | None = None, *, packed: bool = False) -> Iterator[TextIO]:
    """Open a text file in UTF-8 that replaces `path` if the block succeeds; on an exception `path` stays as it was.

    A symbolic link stays, and its target is replaced. A device or a pipe is written directly. Characters that
    UTF-8 cannot encode are written as escapes. `packed`: by gzip, equal bytes for equal text. Raises OSError.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as raw, _text(raw, newline, packed=packed) as file:
            yield file
        return
    place = Path(os.path.realpath(path))
    hidden = place.with_name(f".{secrets.token_hex(8)}.partial")  # cannot be guessed, so nobody can plant a link there
    with replacing(place, hidden) as partial:
        with os.fdopen(new(partial, 0o666), "wb") as raw, _text(raw, newline, packed=packed) as file:
            yield file
        if place.exists():
            partial.chmod(stat.S_IMODE(place.stat().st_mode))


@contextmanager
def _text(raw: BinaryIO, newline: str | None, *, packed: bool) -> Iterator[TextIO]:
    binary = GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) if packed else raw
    with TextIOWrapper(cast(BinaryIO, binary), encoding="utf-8", errors="backslashreplace", newline=newline) as file:
        yield file


def write_private(path: Path, text: str) -> None:
    """Write a text file in UTF-8 that nobody else can read. Raises OSError."""
    with replacing(path) as partial, os.fdopen(new(partial, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def new(path: Path, mode: int) -> int:
    """Return a descriptor to write a file that did not exist, with at most these permissions. Raises OSError if it did."""
    # Windows would write every line feed as two characters; other systems have no such flag.
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk. Windows lets nobody wait for a directory."""
    windows = not hasattr(os, "O_DIRECTORY")
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)  # Windows waits only for files open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
