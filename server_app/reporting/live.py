"""What a person sees while a run goes on: a progress bar, a line per round, and the table at the end."""

import json
import re
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from quickbloom.common.formatting import score

SUMMARY = "Summary: "
_DIRECTORY = "Run directory: "
_FEW_ROUNDS = 200
_ROUND = re.compile(r"\[ROUND (\d+)/(\d+)\]")
_METRICS = re.compile(r"Aggregated MetricRecord: (\{.*\})")
_PAIR = re.compile(r"'([\w-]+)': (-?(?:[\d.]+(?:e[+-]?\d+)?|inf)|nan)")
_WARNING = re.compile(r"(Node|Task|Checkpoint|Round|Privacy) \S+( does|:| is)|\d+ tasks? (is|are) left out:")
"""What of the warnings a person is told."""
_TOLD = {
    "algorithm",
    "dataset",
    "rounds",
    "seed",
    "run_dir",
    "tasks",
    "chosen",
    "test",
    "validation",
    "bytes",
    "seconds",
    "failures",
}
"""What every summary has."""
_LEVEL = re.compile(r"^(INFO|WARNING|ERROR)\s*:\s*")


class LogReader:
    """Reads a run's log line by line: what round it is, what it measured, what went wrong, and the summary."""

    def __init__(self) -> None:
        self.round = 0
        self.total = 0
        self.warned = False
        """Whether the line read last was a warning."""
        self.metrics: dict[str, float] = {}
        self.run_dir = ""
        self.summary: dict[str, Any] | None = None

    def read(self, line: str) -> str | None:
        """Take in one line; returns what a person should read now, if anything."""
        level, text = _split(line)
        self.warned = False
        if level == "WARNING" and _WARNING.match(text):
            self.warned = True
            return text
        # Lines of the server's own begin so, and no word of a node stands at the beginning of one.
        if level != "INFO":
            return None
        if found := _ROUND.fullmatch(text):
            said = self._line()
            self.round, self.total = int(found[1]), int(found[2])
            self.metrics = {}
            return said
        if found := _METRICS.fullmatch(text):
            # Not ast.literal_eval: it cannot read the inf and nan of a run that diverges.
            self.metrics |= {name: float(value) for name, value in _PAIR.findall(found[1])}
        elif text.startswith("Strategy execution finished"):
            return self._line()
        elif text.startswith(_DIRECTORY):
            self.run_dir = text.removeprefix(_DIRECTORY)
        elif text.startswith(SUMMARY):
            self.summary = _summary(text.removeprefix(SUMMARY)) or self.summary
        return None

    def _line(self) -> str | None:
        """The round that has just ended, in words."""
        if not self.metrics:
            return None
        metrics, self.metrics = self.metrics, {}
        if self.total > _FEW_ROUNDS and not {"accuracy-after", "mse-after"} & metrics.keys():
            return None  # of many rounds only those with an evaluation are told
        parts = [f"round {self.round:>{len(str(self.total))}}/{self.total}"]
        if "loss" in metrics:
            parts.append(f"query loss {metrics['loss']:.4f}")
        if "accuracy-after" in metrics:
            before, after = (score(metrics[f"accuracy-{when}"], "accuracy") for when in ("before", "after"))
            parts.append(f"validation accuracy {before} -> {after}")
        if "mse-after" in metrics:
            parts.append(f"validation mean squared error {metrics['mse-before']:.4g} -> {metrics['mse-after']:.4g}")
        return "   ".join(parts)


def _summary(text: str) -> dict[str, Any] | None:
    """The summary that this JSON is; None if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.keys() >= _TOLD else None


def progress_bar(console: Console) -> Progress:
    """A bar over the rounds."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)


def _split(line: str) -> tuple[str, str]:
    found = _LEVEL.match(line.strip())
    return (found[1], line.strip()[found.end() :].strip(" \t│├└─>")) if found else ("", line.strip())
