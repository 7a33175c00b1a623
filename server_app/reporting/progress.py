"""What a person sees while a run goes on: a bar over the rounds, and a line for each of them."""

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


def progress_bar(console: Console, shown: bool = True) -> Progress:
    """Return a bar over the rounds: in a terminal, or below the cell of a notebook."""
    if shown and console.is_jupyter:
        return NotebookProgress(console)
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
        self._warned: set[str] = set() if warned is None else warned
        # Below a cell of a notebook a hundred lines are too many: there the bar says how the newest round went.
        self._in_bar = isinstance(progress, NotebookProgress)

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.run_dir, self.round, self._total = event.run_dir, max(self.round, event.done), event.rounds
                self._progress.update(self._task, description="roll call")
            case RollCalled():
                self._advance()
            case Scored():
                self._scored = event
                if event.round == 0 and self._rounds and not self._in_bar:
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
        if ended.round <= self.round:
            return
        self.round, self._total = ended.round, ended.rounds
        scored = self._scored if self._scored and self._scored.round == ended.round else None
        line = round_line(ended, scored)
        if line and self._rounds and not self._in_bar:
            self._say(line)
        self._advance(line if line and self._in_bar else "training")

    def _advance(self, description: str = "training") -> None:
        self._progress.update(self._task, description=description, total=self._total, completed=self.round)

    def _say(self, line: str, style: str | None = None) -> None:
        if not self._quiet:  # never as markup: parts of it come from nodes
            self._progress.console.print(one_line(line), markup=False, emoji=False, style=style, soft_wrap=True)


def round_line(ended: RoundEnded, scored: Scored | None) -> str | None:
    """A round in words, with the scores of its evaluation, if there was one; None for one that is not worth a line.

    Of many rounds only those with an evaluation are.
    """
    parts = [f"round {ended.round:>{len(str(ended.rounds))}}/{ended.rounds}"]
    if not ended.skipped:
        parts.append(f"query loss {ended.loss:.4f}")
    if scored:
        parts.append(f"validation {change(scored)}")
    return "   ".join(parts) if scored or (len(parts) > 1 and ended.rounds <= _FEW_ROUNDS) else None


def change(scored: Scored) -> str:
    """The scores before and after adaptation: "accuracy 20.0 % -> 75.5 %"."""
    metric = named(scored.metric)
    return f"{metric.title} {metric.change(scored.before, scored.after, '->')}"
