"""Checkpoints of a run: writes them, and removes all but the newest few.

The tensors are the meta-parameters (`meta/...`), the outer optimizer's state (`outer/...`), what an
algorithm keeps on the server (`server/...`), where the next `centered-clip` starts (`centre/...`),
what the root set of `fltrust` contributed last, with momentum (`root/...`), and, after the last round, the scores
of the validation tasks (`validation/...`). If the run ends with an earlier model, `meta/...` is
that one, and the one of the last round is `last/...`. The facts say which run, round and settings
they belong to. There is no random state to keep: every draw is a function of (seed, round, task).

With `keep = "best"` the best model so far is in a file of its own, without the optimizer's state,
and nowhere in memory. Each checkpoint names the round of the best one by then, whose file stays as
long as the checkpoint does.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quickbloom.common.personal import checkpoint as files
from quickbloom.common.personal.checkpoint import Checkpoint, OnDamage
from quickbloom.server_app.events.channel import warn_in_log

__all__ = ["ONLY_MODEL", "Checkpoint", "CheckpointWriter", "OnDamage", "best_file", "load"]

_KEEP = 3
ONLY_MODEL = "only-model"
"""Fact of a file with a model that no run can go on from."""


class CheckpointWriter:
    """Writes the checkpoints of one run into `directory`. `facts`: content common to all of them.

    A killed process loses nothing that was written. A power failure costs about a second: waiting
    for the disk takes as long as a small round, so it is done once a second at most, and the newest
    file that is surely on the disk is kept.
    """

    def __init__(self, directory: Path, facts: dict[str, Any], encoder: Mapping[str, Tensor] | None = None) -> None:
        """`encoder`: tensors of a small encoder, which the checkpoint after the last round carries."""
        self.directory = directory
        self._facts = facts
        self._encoder = dict(encoder or {})
        self._synced = -math.inf
        self._durable: Path | None = None
        self._best_of: dict[Path, int] = {}

    def write(
        self,
        server_round: int,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        *,
        last: bool = False,
        best: int | None = None,
    ) -> Path:
        """Write the checkpoint of a round and remove all but the newest few. A crash at any moment leaves the older ones whole.

        `last`: wait for the disk, since no checkpoint follows. `best`: the round of the best model so far.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"round-{server_round:06d}.safetensors"
        due = last or time.monotonic() - self._synced > 1
        carried = self._encoder if last else {}
        files.write(path, {**tensors, **carried}, {**self._facts, **facts, "round": server_round}, wait=due)
        if due:
            self._synced, self._durable = time.monotonic(), path
        for old in sorted(self.directory.glob("round-*.safetensors"))[:-_KEEP]:
            if old != self._durable:
                old.unlink()
        if best is not None:
            self._best_of[path] = best
            self._remove_best_but(best)
        return path

    def remember(self, path: Path, best: int) -> None:
        """Note that the checkpoint in `path`, of an earlier process, names the best model of round `best`."""
        self._best_of[path] = best

    def write_best(self, server_round: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write the model of a round that is the best so far, and wait for the disk."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = best_file(self.directory, server_round)
        files.write(path, tensors, {**self._facts, **facts, ONLY_MODEL: True, "round": server_round}, wait=True)
        self._remove_best_but(server_round)

    def _remove_best_but(self, newest: int) -> None:
        """Remove the models that neither are `newest` nor belong to a checkpoint of this process that is still there."""
        needed = {newest, *(best for path, best in self._best_of.items() if path.exists())}
        for old in set(self.directory.glob("best-*.safetensors")) - {best_file(self.directory, one) for one in needed}:
            old.unlink()


def best_file(directory: Path, server_round: int) -> Path:
    """Return the file in a folder of checkpoints with the model of a round that was the best so far."""
    return directory / f"best-{server_round:06d}.safetensors"


def load(path: Path, on_damage: OnDamage = warn_in_log) -> Checkpoint:
    """Load a checkpoint as `common.personal.checkpoint.load` does; the error names a damaged file."""
    return files.load(path, on_damage)
