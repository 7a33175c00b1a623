"""Features of examples on this machine, so that an encoder runs once per example, also over restarts.

One SQLite file per encoder, named by its digest, with a row for every example, keyed by a hash of the example: rows that are
added to a file are encoded, all others are found. A file that is damaged, or has features of another size, is made anew. The
file is readable by this user alone, since features tell a good deal about an example.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from logging import WARNING, getLogger
from pathlib import Path

import numpy as np

from quickbloom.common.encoders.base import Features
from quickbloom.common.errors import in_one_line
from quickbloom.common.system import private
from quickbloom.common.system.locks import locked

_FOLDER = "features"
_LOG = getLogger("flwr")
_AT_ONCE = 500
"""Keys in one query; SQLite's limit is 999 in old releases."""


class Cache:
    """The stored features of one encoder."""

    def __init__(self, digest: str, size: int, folder: Path | None = None) -> None:
        """`folder`: instead of the one in the user's cache. Raises OSError if there is no place for it."""
        self._file = (folder or private.folder(_FOLDER)) / f"{digest}.sqlite"
        self._size = size

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes of this machine from encoding the same examples: they wait, and then find them here."""
        with locked(self._file.with_suffix(".lock"), create=True, wait=True):
            yield

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Features]:
        """Return the features [size] of those examples that are stored."""
        try:
            return self._find(keys)
        except sqlite3.OperationalError as error:  # locked for long, a full disk
            _LOG.log(WARNING, "The stored features cannot be read (%s) and are computed again.", in_one_line(error))
            return {}
        except sqlite3.Error as error:
            _LOG.log(WARNING, "The stored features '%s' are damaged (%s) and made anew.", self._file.name, in_one_line(error))
            self._file.unlink(missing_ok=True)
            return {}

    def store(self, found: Mapping[bytes, Features]) -> None:
        """Store features; if that fails, as on a full disk, they are computed again the next time."""
        rows = [(key, np.asarray(value, dtype=np.float32).tobytes()) for key, value in found.items()]
        try:
            with closing(self._open()) as file, file:
                file.executemany("insert or replace into features values (?, ?)", rows)
        except (sqlite3.Error, OSError) as error:
            _LOG.log(WARNING, "Features could not be stored (%s) and will be computed again the next time.", in_one_line(error))

    def _find(self, keys: Sequence[bytes]) -> dict[bytes, Features]:
        found: dict[bytes, Features] = {}
        if not self._file.exists():
            return found
        with closing(self._open()) as file:
            for some in _pieces(keys):
                marks = ",".join("?" * len(some))
                for key, value in file.execute(f"select key, value from features where key in ({marks})", some):
                    if len(value) != 4 * self._size:
                        raise sqlite3.DatabaseError("features of another size")
                    found[bytes(key)] = np.frombuffer(value, dtype=np.float32)
        return found

    def _open(self) -> sqlite3.Connection:
        self._file.touch(mode=0o600)
        file = sqlite3.connect(self._file, timeout=60)
        file.execute("create table if not exists features (key blob primary key, value blob) without rowid")
        return file


def _pieces(keys: Sequence[bytes]) -> Iterable[Sequence[bytes]]:
    return (keys[start : start + _AT_ONCE] for start in range(0, len(keys), _AT_ONCE))
