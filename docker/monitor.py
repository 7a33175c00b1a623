"""TensorBoard over a directory of runs, while they go on and afterwards: monitor.py RUNS [PORT].

A run writes TensorBoard's event files itself with the setting `tensorboard`; of any other this program makes them elsewhere,
from the lines of history.jsonl as they come.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from quickbloom.server_app.runs.tracked_values import FOLDER, scalars

PAUSE = 5.0
"""Seconds between two looks at the runs."""


class Follower:
    """Turns the lines of one history.jsonl into scalars of TensorBoard, each once."""

    def __init__(self, history: Path, events: Path) -> None:
        self._history = history
        self._events = events
        self._writer: SummaryWriter | None = None
        self._rounds: list[int] = []

    def read(self) -> None:
        """Write what is new. A run that is resumed does its last round again: what stood there for it is replaced."""
        lines = _whole_lines(self._history)
        rounds = [int(line["round"]) for line in lines]
        if self._writer is None or rounds[: len(self._rounds)] != self._rounds:
            self._rounds = [old for old, new in zip(self._rounds, rounds, strict=False) if old == new]
            self._writer = SummaryWriter(str(self._events), purge_step=len(self._rounds) + 1)
        for line in lines[len(self._rounds) :]:
            for name, value in scalars(line):
                self._writer.add_scalar(name, value, int(line["round"]))
        self._rounds = rounds
        self._writer.flush()


def _whole_lines(history: Path) -> list[dict[str, Any]]:
    text = history.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def shows_itself(run: Path, events: Path) -> bool:
    """Whether this run writes events of its own; then `events` leads to them."""
    if not (run / FOLDER).is_dir():
        return False
    if not events.is_symlink():
        events.parent.mkdir(parents=True, exist_ok=True)
        events.symlink_to((run / FOLDER).absolute())
    return True


def main(runs: Path, port: str) -> int:
    with tempfile.TemporaryDirectory(prefix="events-") as events:
        # Its fast reader is not in the image.
        command = ["tensorboard", "--logdir", events, "--port", port, "--bind_all", "--load_fast=false", "--reload_interval=5"]
        board = subprocess.Popen(command)
        followers: dict[Path, Follower] = {}
        while board.poll() is None:
            for history in sorted(runs.rglob("history.jsonl")):
                name = history.parent.relative_to(runs)
                if name not in followers and shows_itself(history.parent, Path(events) / name):
                    continue
                follower = followers.setdefault(name, Follower(history, Path(events) / name))
                try:
                    follower.read()
                except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                    print(f"cannot show '{history}': {error}", flush=True)
            time.sleep(PAUSE)
        return board.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "6006"))
