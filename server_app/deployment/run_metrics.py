"""What Prometheus reads of runs, from their directories alone: `history.jsonl`, `config.json` and the lock of a run.

Whoever serves them may be on another machine, or start later: every figure is of the whole run so far.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from quickbloom.common.formatting import data_name
from quickbloom.common.system.locks import is_locked
from quickbloom.server_app.runs.growing_file import GrowingFile

HISTORY = "history.jsonl"
NEWEST = 20
STATES = ("going-on", "ended", "stopped")
"""A run that is neither going on nor ended has stopped before its end."""
_FACTS = frozenset(("adapt_lr", "loss", "tasks", "round"))
"""What stands beside the score in the validation of a round."""


@dataclass
class RunSoFar:
    """The sums over a run's lines of history.jsonl, and its newest values."""

    rounds: int = 0
    planned: int = 0
    seconds: float = 0.0
    asked: int = 0
    skipped: int = 0
    joined: int = 0
    dropped: int = 0
    damaged: int = 0
    moved: Counter[str] = field(default_factory=Counter)
    """Bytes up and down."""
    replies: Counter[str] = field(default_factory=Counter)
    staleness: Counter[str] = field(default_factory=Counter)
    last: dict[str, Any] = field(default_factory=dict)
    """The newest line."""
    scores: dict[tuple[str, str], float] = field(default_factory=dict)
    """The newest validation scores by (metric, "before" or "after" adaptation)."""

    def take(self, line: bytes) -> None:
        """Add a line. One that cannot be read is counted."""
        try:
            self._add(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            self.damaged += 1

    def _add(self, record: dict[str, Any]) -> None:
        nodes, seconds, moved = record["nodes"], float(record["seconds"]), record["bytes"]
        replies = {"answered": int(nodes["answered"]), "failed": len(record["failures"]), "late": sum(nodes["late"].values())}
        told = record.get("async") or {}
        self.rounds, self.seconds = self.rounds + 1, self.seconds + seconds
        self.asked += int(nodes["asked"])
        self.moved.update({way: int(moved[way]) for way in ("up", "down")})
        self.replies.update(replies)
        self.skipped += bool(record.get("skipped"))
        self.joined += len(record.get("joined", {}).get("nodes", []))
        self.dropped += int(told.get("dropped", 0))
        self.staleness.update(told.get("staleness", {}))
        self.last = record
        scored = record.get("validation") or {}
        for metric in scored.keys() - _FACTS:
            self.scores |= {(metric, "before"): _number(scored[metric][0]), (metric, "after"): _number(scored[metric][-1])}


class RunMetrics:
    """A collector of prometheus_client for the newest runs in a directory."""

    def __init__(self, runs: Path, newest: int = NEWEST) -> None:
        self._runs, self._newest = runs, newest
        self._known: dict[Path, tuple[GrowingFile, RunSoFar]] = {}
        self._reading = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics as they are now; see docs/metrics.md."""
        with self._reading:
            found = {self._name(path): (path, self._read(path)) for path in self._directories()}
        gauges, counters = _Families(GaugeMetricFamily), _Families(CounterMetricFamily)
        for run, (path, so_far) in found.items():
            config = _config(path)
            facts = [str(config.get(name, "")) for name in ("algorithm", "seed")]
            gauges.add("run_info", "1; what a run is of", 1, run=run, algorithm=facts[0], data=data_name(config), seed=facts[1])
            now = _state(path)
            for state in STATES:
                gauges.add("run_state", "1 for the state that a run is in, else 0", state == now, run=run, state=state)
            gauges.add("rounds_planned", "rounds that the run is meant to have", int(config.get("rounds", 0)), run=run)
            counters.add("rounds", "rounds that have ended", so_far.rounds, run=run)
            counters.add("training_seconds", "seconds of all rounds", so_far.seconds, run=run)
            counters.add("requests", "messages that were sent to nodes", so_far.asked, run=run)
            for outcome in ("answered", "failed", "late"):
                counters.add(
                    "replies", "answers of nodes, by what became of them", so_far.replies[outcome], run=run, outcome=outcome
                )
            for way in ("up", "down"):
                counters.add(
                    "bytes",
                    "bytes of tensors up to the server and down to the nodes",
                    so_far.moved[way],
                    run=run,
                    direction=way,
                )
            counters.add("skipped_rounds", "rounds that left the model as it was", so_far.skipped, run=run)
            counters.add("joined_nodes", "nodes that came during the run", so_far.joined, run=run)
            counters.add("dropped_contributions", "contributions that were too old (mode async)", so_far.dropped, run=run)
            for steps, number in so_far.staleness.items():
                counters.add(
                    "contributions", "contributions by their age in steps (mode async)", number, run=run, staleness=steps
                )
            counters.add("damaged_lines", "lines of history.jsonl that cannot be read", so_far.damaged, run=run)
            if so_far.last:
                self._newest_of(gauges, run, path, so_far)
        yield from gauges.all()
        yield from counters.all()

    @staticmethod
    def _newest_of(gauges: "_Families", run: str, path: Path, so_far: RunSoFar) -> None:
        last = so_far.last
        gauges.add(
            "last_round_timestamp_seconds",
            "when the newest round ended, in Unix time",
            (path / HISTORY).stat().st_mtime,
            run=run,
        )
        gauges.add("round_seconds", "seconds of the newest round", float(last["seconds"]), run=run)
        gauges.add("train_loss", "mean query loss of the newest round", _number(last["train"]["loss"]), run=run)
        for (metric, when), value in so_far.scores.items():
            text = "newest mean over the validation users, before and after adaptation"
            gauges.add("validation_score", text, value, run=run, metric=metric, when=when)
        nodes = last["nodes"]
        counts = {"asked": nodes["asked"], "answered": nodes["answered"], "away": len(nodes["away"])}
        for state, number in counts.items():
            gauges.add("nodes", "messages and nodes of the newest round", int(number), run=run, state=state)
        if last.get("privacy"):
            gauges.add("epsilon", "what the run has spent of its privacy", _number(last["privacy"]["epsilon"]), run=run)
        if last.get("virtual_hours") is not None:
            gauges.add("virtual_hours", "hours of virtual time (setting devices)", float(last["virtual_hours"]), run=run)

    def _directories(self) -> list[Path]:
        """Return the directories of the runs that were written to last."""
        found = [(file.stat().st_mtime, file.parent) for file in self._runs.rglob("config.json")]
        newest = sorted(found, reverse=True)[: self._newest]
        return sorted(path for _, path in newest)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._runs).as_posix() if path != self._runs else path.absolute().name

    def _read(self, path: Path) -> RunSoFar:
        file, so_far = self._known.get(path, (GrowingFile(path / HISTORY), RunSoFar()))
        lines, anew = file.read()
        so_far = RunSoFar() if anew else so_far
        for line in lines:
            so_far.take(line)
        self._known[path] = file, so_far
        return so_far


class _Families:
    """Families of one kind of metric, made when a value is added."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._made: dict[str, Any] = {}

    def add(self, name: str, text: str, value: float, **labels: str) -> None:
        if name not in self._made:
            self._made[name] = self._kind(f"quickbloom_{name}", text, labels=list(labels))
        self._made[name].add_metric(list(labels.values()), float(value))

    def all(self) -> Iterator[Metric]:
        yield from self._made.values()


def _state(path: Path) -> str:
    if (path / "summary.json").exists():
        return "ended"
    return "going-on" if is_locked(path) else "stopped"


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: float | None) -> float:
    """A number of a file, in which null stands for what is not finite."""
    return float("nan") if value is None else float(value)
