"""What a person sees while a run goes on: a bar over the rounds, and a line for each of them."""

from collections import deque
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from quickbloom.common.metric import named
from quickbloom.common.printable import one_line
from quickbloom.common.system import logs
from quickbloom.common.system.terminal import taken
from quickbloom.server_app.events.kinds import (
    Ended,
    Event,
    Failed,
    Joined,
    RollCalled,
    RoundEnded,
    Scored,
    Started,
    Stopped,
    Warned,
)
from quickbloom.server_app.reporting.notebook_progress import NotebookProgress

_FEW_ROUNDS = 200
_NEWEST = 30
"""Rounds by which the pace is told."""


def progress_bar(console: Console, shown: bool = True) -> Progress:
    """Return a bar over the rounds: in a terminal, or below the cell of a notebook."""
    if shown and console.is_jupyter:
        return NotebookProgress(console)
    shown = shown and not logs.is_json()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True, disable=not shown)


class Shown:
    """Shows a person the events of a run as they come: a line for every round and every warning, and a bar over the rounds.

    `rounds`: whether to tell of rounds line by line; `quiet`: the bar alone. What was told once is not told again: after a
    connection is lost, Flower's log comes from its beginning. `warned`: what was told already, of other runs, say; it grows.
    `round`: the newest that is over; `stopped`: why there are no more.
    """

    def __init__(
        self,
        progress: Progress,
        task: TaskID,
        *,
        rounds: bool = True,
        quiet: bool = False,
        warned: set[str] | None = None,
    ) -> None:
        self.run_dir = ""
        self.round = 0
        self.summary: dict[str, Any] | None = None
        self.stopped = ""
        self._progress, self._task = progress, task
        self._rounds, self._quiet = rounds, quiet
        self._total: int | None = None
        self._scored: Scored | None = None
        self._pace = Pace()
        self._warned: set[str] = set() if warned is None else warned
        # Below a cell of a notebook a hundred lines are too many: there the bar says how the newest round went.
        self._in_bar = isinstance(progress, NotebookProgress)

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                logs.know(run=Path(event.run_dir).name)
                self.run_dir, self.round, self._total = event.run_dir, max(self.round, event.done), event.rounds
                self._progress.update(self._task, description="roll call")
            case RollCalled():
                self._advance()
            case Scored() if event.round:
                self._scored = event
            case Scored():
                if self._rounds and not self._in_bar:
                    self._say(f"before training   validation {change(event)}")
            case RoundEnded():
                self._end_round(event)
            case Joined():
                self.say_once(event.sentence)
            case Warned() | Failed():
                self.warn(event.sentence)
            case Ended():
                self.summary = event.summary
            case Stopped():
                self.stopped = event.reason

    def warn(self, sentence: str) -> None:
        """Warn a person, once."""
        self.say_once(sentence, style="yellow")

    def say_once(self, sentence: str, style: str | None = None) -> None:
        """Tell a person something once."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            self._say(sentence, style)

    def _end_round(self, ended: RoundEnded) -> None:
        scored, self._scored = self._scored, None
        if ended.round <= self.round:
            return
        self.round, self._total = ended.round, ended.rounds
        logs.know(round=ended.round)
        self._pace.add(ended)
        line = round_line(ended, scored, self._pace)
        if line and self._rounds and not self._in_bar:
            self._say(line)
        self._advance(line if line and self._in_bar else "training")

    def _advance(self, description: str = "training") -> None:
        self._progress.update(self._task, description=description, total=self._total, completed=self.round)

    def _say(self, line: str, style: str | None = None) -> None:
        if not self._quiet and not taken(line, WARNING if style else INFO):  # never as markup: parts of it come from nodes
            self._progress.console.print(one_line(line), markup=False, emoji=False, style=style, soft_wrap=True)


class Pace:
    """How many steps a run takes in a minute, or in an hour of virtual time, by its newest rounds."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_NEWEST)
        self._hours: deque[float] = deque(maxlen=_NEWEST)

    def add(self, ended: RoundEnded) -> None:
        """Take one more round into account."""
        self._seconds.append(ended.seconds)
        if ended.virtual_hours is not None:
            self._hours.append(ended.virtual_hours)

    def __str__(self) -> str:
        """Return "43 steps a minute", or "12 steps an hour" of virtual time; "" as long as it is not known."""
        if self._hours:
            passed, steps, unit = self._hours[-1] - self._hours[0], len(self._hours) - 1, "an hour"
        else:
            passed, steps, unit = sum(self._seconds) / 60, len(self._seconds), "a minute"
        if passed <= 0:
            return ""
        pace = steps / passed
        return f"{pace:,.0f} steps {unit}" if pace >= 100 else f"{pace:.3g} steps {unit}"


def round_line(ended: RoundEnded, scored: Scored | None, pace: Pace | None = None) -> str | None:
    """A round in words, with the scores that came in during it, if there were some; None for one that is not worth a line.

    Of many rounds only those with scores are. `pace` is told in mode async, where a round is one step.
    """
    parts = [f"round {ended.round:>{len(str(ended.rounds))}}/{ended.rounds}"]
    if not ended.skipped:
        parts.append(f"query loss {ended.loss:.4f}")
    if scored:
        parts.append(f"validation {change(scored)}{of_earlier(scored, ended)}")
    told = bool(scored) or (len(parts) > 1 and ended.rounds <= _FEW_ROUNDS)
    if ended.staleness is not None:
        parts += [f"staleness {ended.staleness:.2g}", f"{ended.at_work} at work"]
        parts += [f"{ended.dropped} dropped"] * bool(ended.dropped) + [str(pace)] * bool(pace and str(pace))
    if ended.virtual_hours is not None:
        parts.append(f"{ended.virtual_hours:.2f} virtual h")
    return "   ".join(parts) if told else None


def of_earlier(scored: Scored, ended: RoundEnded) -> str:
    """Say whose scores came in with this round, if they are not its own: in mode async training does not wait for them."""
    return "" if scored.round == ended.round else f" in round {scored.round}"


def change(scored: Scored) -> str:
    """The scores before and after adaptation: "accuracy 20.0 % -> 75.5 %"."""
    metric = named(scored.metric)
    return f"{metric.title} {metric.change(scored.before, scored.after, '->')}"
