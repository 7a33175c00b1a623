"""Following a run from its directory alone: on this machine, on a mounted volume, while it goes on or when it is over."""

import fcntl
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from quickbloom.common.errors import ConfigError, as_told, in_one_line
from quickbloom.common.formatting import score, size
from quickbloom.common.wording import data_name, duration, metric_name, metric_of
from quickbloom.server_app.reporting.result_table import result_table

_PACE = 30  # newest rounds whose median says how long the rest will take
_TOLD = 5  # newest failures that are shown
_QUIET = 5.0  # seconds without a new round after which it is asked whether the run still goes on


@dataclass
class Watched:
    """What is known of a run, from what `read` has read of its directory so far."""

    directory: Path
    total: int = 0
    """Rounds that the run is meant to have; 0 as long as it has not said."""
    name: str = ""
    round: int = 0
    loss: float | None = None
    evaluations: list[tuple[int, str, float | None, float | None]] = field(default_factory=list)
    """(round, metric, before adaptation, best after it) of every evaluation on the validation tasks."""
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    nodes: str = ""
    traffic: int = 0
    """Bytes up and down of all rounds."""
    summary: dict[str, Any] | None = None
    _offset: int = 0
    _inode: int = 0

    def read(self) -> list[dict[str, Any]]:
        """Take in what has been written since; returns the new rounds. A line that is still being written waits."""
        if not self.total and (config := _json(self.directory / "config.json")):
            self.total = int(config.get("rounds", 0))
            self.name = as_told(f"{config.get('algorithm')} on {data_name(config)}, seed {config.get('seed')}")
        try:
            new = [json.loads(line) for line in self._lines()]
            for record in new:
                self._take(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            file = self.directory / "history.jsonl"
            raise ConfigError(f"'{file}' holds a line that is no round ({in_one_line(error)}): it is damaged") from None
        self.summary = _json(self.directory / "summary.json")
        return new

    def _lines(self) -> list[bytes]:
        file = self.directory / "history.jsonl"
        if not file.exists():
            return []
        with file.open("rb") as opened:
            facts = os.fstat(opened.fileno())
            if (
                facts.st_ino != self._inode or facts.st_size < self._offset
            ):  # a resumed run writes the history anew, into another file
                self.__dict__.update(Watched(self.directory, self.total, self.name, _inode=facts.st_ino).__dict__)
            opened.seek(self._offset)
            whole, newline, _ = opened.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return whole.split(b"\n") if newline else []

    def _take(self, record: dict[str, Any]) -> None:
        self.round = record["round"]
        self.loss = (record.get("train") or {}).get("loss")
        self.seconds.append(record["seconds"])
        self.traffic += sum(record["bytes"].values())
        told = [as_told(f"{failure['who']}: {failure['reason']}", 600) for failure in record["failures"]]
        self.failures += [f"round {self.round}: {words}" for words in told]
        if nodes := record.get("nodes"):
            self.nodes = f"{nodes['answered']} of {nodes['asked']}"
        if scores := record.get("validation"):
            metric = metric_of(scores)
            steps = scores[metric]
            known = [value for value in steps[1:] if value is not None]
            best = (max if metric == "accuracy" else min)(known) if known else None
            self.evaluations.append((self.round, metric, steps[0], best))

    @property
    def seconds_left(self) -> float | None:
        """Of the rounds that are missing, by the median of the newest; None if nothing is known."""
        if not self.seconds or not self.total:
            return None
        return statistics.median(self.seconds[-_PACE:]) * max(0, self.total - self.round)

    def line(self) -> str:
        """The newest round in words."""
        parts = [f"round {self.round}/{self.total or '?'}"]
        if self.loss is not None:
            parts.append(f"query loss {self.loss:.4f}")
        if self.evaluations and self.evaluations[-1][0] == self.round:
            parts.append(f"validation {_change(self.evaluations[-1])}")
        if self.nodes:
            parts.append(f"replies {self.nodes}")
        parts.append(f"failures {len(self.failures)}")
        if left := self.seconds_left:
            parts.append(f"{duration(round(left))} left")
        return "   ".join(parts)

    def panel(self) -> RenderableType:
        """Everything at once, for a terminal."""
        facts = Table.grid(padding=(0, 2))
        facts.add_row("run", Text(f"{self.name or 'starting'}   {self.directory}"))
        facts.add_row("rounds", ProgressBar(total=self.total or None, completed=self.round, width=40, pulse=not self.total))
        facts.add_row("", f"{self.round} of {self.total or '?'}")
        if not self.summary:
            facts.add_row("time left", self._left())
        facts.add_row("query loss", "?" if self.loss is None else f"{self.loss:.4f}")
        if self.evaluations:
            last = self.evaluations[-1]
            facts.add_row("validation", f"{_change(last)} in round {last[0]}{self._best()}")
        facts.add_row("replies", f"{self.nodes or '?'} in the last round")
        facts.add_row("traffic", size(self.traffic))
        facts.add_row("failures", str(len(self.failures)))
        told = [Text(f"  {failure}", style="yellow") for failure in self.failures[-_TOLD:]]
        return Group(facts, *told)

    def _left(self) -> str:
        left, pace = self.seconds_left, f"({self._pace():.2f} s a round)" if self.seconds else ""
        if left is None:
            return "?"
        # The last round is not the end of a run: its result is still to be computed.
        return f"{duration(round(left))} {pace}" if left else f"the test of the result {pace}"

    def _pace(self) -> float:
        return statistics.median(self.seconds[-_PACE:])

    def _best(self) -> str:
        known = [entry for entry in self.evaluations if entry[3] is not None]
        if len(known) < 2:
            return ""
        better = max if known[0][1] == "accuracy" else min
        best = better(known, key=lambda entry: entry[3] or 0.0)
        return f"; best {score(best[3], best[1])} in round {best[0]}"


def watch(directory: Path, console: Console, *, once: bool, pause: float = 1.0) -> bool:
    """Show a run until it is over, or with `once` as it is now. Returns whether it goes on or came to its end.

    On a terminal one picture that changes, elsewhere one line per round. Raises ConfigError without a run there.
    """
    watched = Watched(directory)
    if not (
        directory.is_dir() and any((directory / name).exists() for name in ("config.json", "history.jsonl", "checkpoints"))
    ):
        raise ConfigError(f"RUN_DIR must be the directory of a run, got '{directory}': look into ./runs for their names")
    if once or not console.is_terminal:
        for new in _follow(watched, pause, once=once):
            if new:
                console.print(watched.line(), markup=False, soft_wrap=True)
    else:
        with Live(console=console, auto_refresh=False) as live:
            for _ in _follow(watched, pause, once=False):
                live.update(watched.panel(), refresh=True)
    if watched.summary:
        console.print(result_table(watched.summary))
        return True
    if going_on(directory):
        return True
    console.print(
        f"This run has stopped before its end; to go on: quickbloom run --resume {directory}", markup=False, soft_wrap=True
    )
    return False


def _follow(watched: Watched, pause: float, *, once: bool) -> Iterator[list[dict[str, Any]]]:
    """The new rounds of every look, until the run is over."""
    last = time.monotonic()
    while True:
        if new := watched.read():
            last = time.monotonic()
        yield new
        if once or watched.summary:
            return
        if time.monotonic() - last > _QUIET:
            if not going_on(watched.directory):
                return
            last = time.monotonic()
        time.sleep(pause)


def going_on(directory: Path) -> bool:
    """Whether a process works in this directory. A run holds a lock on it; file systems without locks never say yes."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def newest(runs: Path) -> Path:
    """The run directory in `runs` that was written to last. Raises ConfigError if there is none."""
    found = [path for path in runs.glob("*") if (path / "config.json").exists()]
    if not found:
        raise ConfigError(f"there is no run in '{runs}': give the directory of one")
    return max(found, key=lambda path: max(file.stat().st_mtime for file in path.glob("*.json*")))


def _json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _change(entry: tuple[int, str, float | None, float | None]) -> str:
    _, metric, before, after = entry
    return f"{metric_name(metric)} {score(before, metric)} -> {score(after, metric)}"
