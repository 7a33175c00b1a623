"""Flower's SuperLink with less work per request; all other code is Flower's own, called as its command calls it.

- For every piece of every message Flower searches its database for lost tasks and writes twice,
  although tasks have half a minute. The requests of a round wait for each other's writes. Here the
  search is once a second.
- The requests of a run's server bypass layers that are not for them (`common.flower.http`).

These are patches of `common.flower.registry`, each with its own guard.
"""

import importlib
import importlib.metadata
import sys
import time
from typing import Any

from quickbloom.common.flower import registry

PAUSE = 1.0
"""Seconds between two searches for lost tasks."""


def command(*arguments: str) -> list[str]:
    """Return the command line that starts Flower's SuperLink with these patches."""
    # -P: nothing is imported from the working directory.
    return [
        sys.executable,
        "-P",
        "-c",
        "from quickbloom.common.flower.superlink import main; main()",
        "flower-superlink",
        *arguments,
    ]


def main() -> None:
    """Run `flower-superlink`, which is the first argument, with the arguments after it."""
    sys.argv = sys.argv[1:]
    registry.apply("lost-tasks", "past-layers", "look-ups")
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="flower-superlink")
    entry.load()()


def look_seldom() -> None:
    """Let every state of this process search for lost tasks after PAUSE at the earliest."""
    state: Any = importlib.import_module("flwr.supercore.corestate.sql_corestate").SqlCoreState
    look = state._cleanup_expired_task_tokens

    def seldom(self: Any) -> None:
        now = time.monotonic()
        if now - getattr(self, "_looked", -PAUSE) >= PAUSE:
            self._looked = now
            look(self)

    state._cleanup_expired_task_tokens = seldom
