"""Checkpoints of a run: writes them, and removes all but the newest few.

The tensors are the meta-parameters (`meta/...`), the outer optimizer's state (`outer/...`) and,
after the last round, the scores of the validation tasks (`validation/...`). The facts say which
run, round and settings they belong to. There is no random state to keep: every draw is a function
of (seed, round, task).
"""

import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from quickbloom.common.personal import checkpoint as files
from quickbloom.common.personal.checkpoint import Checkpoint, OnDamage
from quickbloom.server_app.events.channel import warn_in_log

__all__ = ["Checkpoint", "CheckpointWriter", "OnDamage", "load"]

_KEEP = 3


class CheckpointWriter:
    """Writes the checkpoints of one run into `directory`. `facts`: content common to all of them.

    A killed process loses nothing that was written. A power failure costs about a second: waiting
    for the disk takes as long as a small round, so it is done once a second at most, and the newest
    file that is surely on the disk is kept.
    """

    def __init__(self, directory: Path, facts: dict[str, Any]) -> None:
        self._directory = directory
        self._facts = facts
        self._synced = -math.inf
        self._durable: Path | None = None

    def write(self, server_round: int, tensors: dict[str, Tensor], facts: dict[str, Any], *, last: bool = False) -> Path:
        """Write the checkpoint of a round and remove all but the newest few. A crash at any moment leaves the older ones whole.

        `last`: wait for the disk, since no checkpoint follows.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"round-{server_round:06d}.safetensors"
        due = last or time.monotonic() - self._synced > 1
        files.write(path, tensors, {**self._facts, **facts, "round": server_round}, wait=due)
        if due:
            self._synced, self._durable = time.monotonic(), path
        for old in sorted(self._directory.glob("round-*.safetensors"))[:-_KEEP]:
            if old != self._durable:
                old.unlink()
        return path


def load(path: Path, on_damage: OnDamage = warn_in_log) -> Checkpoint:
    """Load a checkpoint as `common.personal.checkpoint.load` does; the error names a damaged file."""
    return files.load(path, on_damage)
