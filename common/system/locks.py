"""Locks on files and directories, which end with the process that holds them, however that ends.

Linux and macOS have them. On Windows, and on file systems without locks, nothing is locked and nobody is kept out.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def locked(path: Path, *, create: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file or a directory.

    `create`: make the file if need be, for this user alone; a link is refused. `wait`: until nobody else holds the lock.
    Raises BlockingIOError if somebody else holds it, and any other OSError if the file cannot be opened.
    """
    if fcntl is None:
        yield
        return
    making = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    descriptor = os.open(path, (making if create else os.O_RDONLY) | os.O_CLOEXEC, 0o600)
    try:
        _take(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file or a directory; False where there are no locks."""
    if fcntl is None:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _take(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _take(descriptor: int, how: int) -> None:
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        raise
    except OSError:
        # A file system without locks.
        pass
