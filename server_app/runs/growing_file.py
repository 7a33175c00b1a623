"""A file to which a run adds lines, read by whoever follows the run."""

import os
from pathlib import Path


class GrowingFile:
    """The lines of a file, each once. A run that is resumed writes its files anew, and so they are then read from the start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._inode = 0

    def read(self) -> tuple[list[bytes], bool]:
        """Return (the whole lines that are new, whether they begin at the start of another file than before).

        A line that is still being written waits. A file that is not there yet has no lines.
        """
        if not self._path.exists():
            return [], False
        with self._path.open("rb") as opened:
            facts = os.fstat(opened.fileno())
            anew = facts.st_ino != self._inode or facts.st_size < self._offset
            if anew:
                self._offset, self._inode = 0, facts.st_ino
            opened.seek(self._offset)
            whole, newline, _ = opened.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return whole.split(b"\n") if newline else [], anew
