"""Following a run from its directory alone: on this machine, on a mounted volume, while it goes on or when it is over."""

import json
import math
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

from quickbloom.common.errors import ConfigError, as_told
from quickbloom.common.formatting import counted, data_name, duration, size
from quickbloom.common.metric import named
from quickbloom.common.system.locks import is_locked
from quickbloom.server_app.events.file import FILE
from quickbloom.server_app.events.kinds import Event, Failed, Joined, RoundEnded, Scored, Started, Stopped, Warned, from_line
from quickbloom.server_app.reporting.progress import Pace, change, of_earlier
from quickbloom.server_app.reporting.result_table import result_table
from quickbloom.server_app.runs.growing_file import GrowingFile

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
    evaluations: list[Scored] = field(default_factory=list)
    scored: Scored | None = None
    """The scores that came in with the newest round."""
    ended: RoundEnded | None = None
    """The newest round."""
    pace: Pace = field(default_factory=Pace)
    dropped: int = 0
    """Contributions that were too old, of all steps in mode async."""
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Each once."""
    joined: list[str] = field(default_factory=list)
    """Nodes that joined during the run, in words."""
    stopped: str = ""
    """Why the run cannot go on, if it said so."""
    damaged: int = 0
    """Lines that cannot be read."""
    nodes: str = ""
    traffic: int = 0
    """Bytes up and down of all rounds."""
    summary: dict[str, Any] | None = None
    _waiting: Scored | None = None
    _file: GrowingFile | None = None

    def read(self) -> list[Event]:
        """Take in what has been written since; returns the new events. A line that is still being written waits."""
        if not self.name and (config := _json(self.directory / "config.json")):
            self.total = int(config.get("rounds", 0))
            self.name = as_told(f"{config.get('algorithm')} on {data_name(config)}, seed {config.get('seed')}")
        new = []
        for line in self._lines():
            if (event := from_line(line)) is not None:
                self._take(event)
                new.append(event)
            else:
                self.damaged += not _is_json(line)
        self.summary = _json(self.directory / "summary.json")
        return new

    def _lines(self) -> list[bytes]:
        self._file = self._file or GrowingFile(self.directory / FILE)
        lines, anew = self._file.read()
        if anew:
            self.__dict__.update(Watched(self.directory, self.total, self.name, _file=self._file).__dict__)
        return lines

    def _take(self, event: Event) -> None:
        match event:
            case Started():
                self.total, self.stopped = event.rounds, ""
            case RoundEnded():
                self.round, self.total, self.loss = event.round, event.rounds, event.loss
                self.seconds.append(event.seconds)
                self.traffic += event.up + event.down
                self.nodes = f"{event.answered} of {event.asked}"
                self.ended, self.scored, self._waiting = event, self._waiting, None
                self.dropped += event.dropped
                self.pace.add(event)
            case Scored():
                self.evaluations.append(event)
                self._waiting = event if event.round else None
            case Failed():
                told = as_told(f"{event.who}: {event.reason}", 600)
                self.failures.append(f"round {event.round}: {told}")
            case Warned() if (told := as_told(event.sentence, 600)) not in self.warnings:
                self.warnings.append(told)
            case Joined():
                self.joined.append(f"{event.sentence} in round {event.round}")
            case Stopped():
                self.stopped = as_told(event.reason, 600)

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
        if self.scored and self.ended:
            parts.append(f"validation {change(self.scored)}{of_earlier(self.scored, self.ended)}")
        if self.nodes:
            parts.append(f"replies {self.nodes}")
        parts.append(f"failures {len(self.failures)}")
        parts += [f"{what} {told}" for what, told in self._asynchronous()]
        if left := self.seconds_left:
            parts.append(f"{duration(round(left))} left")
        return "   ".join(parts)

    def _asynchronous(self) -> list[tuple[str, str]]:
        """What there is to say of mode async and of virtual time."""
        last, told = self.ended, []
        if last is not None and last.staleness is not None:
            told = [("pace", str(self.pace) or "?"), ("staleness", f"{last.staleness:.2g}"), ("at work", str(last.at_work))]
            told.append(("dropped", str(self.dropped)))
            if last.rarely:
                told.append(("rarely", ", ".join(as_told(task, 60) for task in last.rarely)))
        if last is not None and last.virtual_hours is not None:
            told.append(("virtual hours", f"{last.virtual_hours:.2f}"))
        return told

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
            facts.add_row("validation", f"{change(last)} in round {last.round}{self._best()}")
        facts.add_row("replies", f"{self.nodes or '?'} in the last round")
        if self.joined:
            facts.add_row("joined", f"{counted(len(self.joined), 'node')}, the last: {self.joined[-1]}")
        facts.add_row("traffic", size(self.traffic))
        facts.add_row("failures", str(len(self.failures)))
        for what, said in self._asynchronous():
            facts.add_row(what, Text(said))  # names of tasks are no markup
        told = [Text(f"  {words}", style="yellow") for words in self.failures[-_TOLD:]]
        return Group(facts, *told, *(Text(words, style="yellow") for words in self.warnings))

    def _left(self) -> str:
        left, pace = self.seconds_left, f"({self._pace():.2f} s a round)" if self.seconds else ""
        if left is None:
            return "?"
        # The last round is not the end of a run: its result is still to be computed.
        return f"{duration(round(left))} {pace}" if left else f"the test of the result {pace}"

    def _pace(self) -> float:
        return statistics.median(self.seconds[-_PACE:])

    def _best(self) -> str:
        known = [entry for entry in self.evaluations if math.isfinite(entry.after)]
        if len(known) < 2:
            return ""
        metric = named(known[0].metric)
        best = min(known, key=lambda entry: metric.cost(entry.after))
        return f"; best {metric.score(best.after)} in round {best.round}"


def watch(directory: Path, console: Console, *, once: bool, pause: float = 1.0) -> bool:
    """Show a run until it is over, or with `once` as it is now. Returns whether it goes on or came to its end.

    On a terminal one picture that changes, elsewhere one line per round. Raises ConfigError without a run there.
    """
    watched = Watched(directory)
    if not (directory.is_dir() and any((directory / name).exists() for name in ("config.json", FILE, "checkpoints"))):
        raise ConfigError(f"RUN_DIR must be the directory of a run, got '{directory}': look into ./runs for their names")
    if once or not console.is_terminal:
        warned = 0
        for new in _follow(watched, pause, once=once):
            warned = min(warned, len(watched.warnings))  # of a resumed run they begin anew
            for words in watched.warnings[warned:]:
                console.print(words, markup=False, style="yellow", soft_wrap=True)
            warned = len(watched.warnings)
            for event in new:
                if isinstance(event, Joined):
                    console.print(event.sentence, markup=False, soft_wrap=True)
            if any(isinstance(event, RoundEnded) for event in new):
                console.print(watched.line(), markup=False, soft_wrap=True)
    else:
        with Live(console=console, auto_refresh=False) as live:
            for _ in _follow(watched, pause, once=False):
                live.update(watched.panel(), refresh=True)
    if watched.damaged:
        console.print(f"{counted(watched.damaged, 'line')} of '{directory / FILE}' cannot be read: it is damaged", markup=False)
    if watched.summary:
        console.print(result_table(watched.summary))
        return True
    if going_on(directory):
        return True
    if watched.stopped:
        console.print(f"error: {watched.stopped}", markup=False, soft_wrap=True)
    console.print(
        f"This run has stopped before its end; to go on: quickbloom run --resume {directory}", markup=False, soft_wrap=True
    )
    return False


def _follow(watched: Watched, pause: float, *, once: bool) -> Iterator[list[Event]]:
    """The new events of every look, until the run is over."""
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
    return is_locked(directory)


def newest(runs: Path) -> Path:
    """The run directory in `runs` that was written to last. Raises ConfigError if there is none."""
    found = [path for path in runs.glob("*") if (path / "config.json").exists()]
    if not found:
        raise ConfigError(f"there is no run in '{runs}': give the directory of one")
    return max(found, key=lambda path: max(file.stat().st_mtime for file in path.glob("*.json*")))


def _is_json(line: bytes) -> bool:
    """Whether a line that is no event known here may be one of a newer version."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
