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

HISTORY, CONFIG = "history.jsonl", "config.json"
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
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase; empty for a run of a release that did not measure them."""
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
        # A line without what `_newest_of` shows counts as damaged, before anything of it is taken.
        _ = _number(record["train"]["loss"]), len(record["nodes"]["away"])
        nodes, seconds, moved = record["nodes"], float(record["seconds"]), record["bytes"]
        replies = {"answered": int(nodes["answered"]), "failed": len(record["failures"]), "late": sum(nodes["late"].values())}
        told = record.get("async") or {}
        phases = {phase: float(value) for phase, value in record.get("phases", {}).items()}
        _ = int(nodes.get("connected", 0)), [int(held) for held in record.get("memory", {}).values()]
        self.rounds, self.seconds = self.rounds + 1, self.seconds + seconds
        self.asked += int(nodes["asked"])
        self.moved.update({way: int(moved[way]) for way in ("up", "down")})
        self.replies.update(replies)
        self.skipped += bool(record.get("skipped"))
        self.joined += len(record.get("joined", {}).get("nodes", []))
        self.dropped += int(told.get("dropped", 0))
        self.staleness.update(told.get("staleness", {}))
        self.phases |= {phase: self.phases.get(phase, 0.0) + value for phase, value in phases.items()}
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
        """Yield all metrics as they are now; see docs/metrics.md. A run that cannot be read costs no other run its figures."""
        with self._reading:
            families, unreadable = _Families(), 0
            for path in self._directories():
                of_run = _Families()
                try:
                    self._add(of_run, self._name(path), path)
                except (OSError, ValueError, KeyError, TypeError, AttributeError):
                    unreadable += 1
                else:
                    families.take(of_run)
            families.gauge("unreadable_runs", "runs whose files cannot be read", unreadable)
        yield from families.all()

    def _add(self, to: "_Families", run: str, path: Path) -> None:
        config, so_far = _config(path), self._read(path)
        facts = [str(config.get(name, "")) for name in ("algorithm", "seed")]
        to.gauge("run_info", "1; what a run is of", 1, run=run, algorithm=facts[0], data=data_name(config), seed=facts[1])
        now = _state(path)
        for state in STATES:
            to.gauge("run_state", "1 for the state that a run is in, else 0", state == now, run=run, state=state)
        to.gauge("rounds_planned", "rounds that the run is meant to have", int(config.get("rounds", 0)), run=run)
        to.counter("rounds", "rounds that have ended", so_far.rounds, run=run)
        to.counter("training_seconds", "seconds of all rounds", so_far.seconds, run=run)
        to.counter("requests", "messages that were sent to nodes", so_far.asked, run=run)
        for phase, seconds in so_far.phases.items():
            to.counter("phase_seconds", "seconds of all rounds, by what the server did", seconds, run=run, phase=phase)
        for outcome in ("answered", "failed", "late"):
            text = "answers of nodes, by what became of them"
            to.counter("replies", text, so_far.replies[outcome], run=run, outcome=outcome)
        for way in ("up", "down"):
            text = "bytes of tensors up to the server and down to the nodes"
            to.counter("bytes", text, so_far.moved[way], run=run, direction=way)
        to.counter("skipped_rounds", "rounds that left the model as it was", so_far.skipped, run=run)
        to.counter("joined_nodes", "nodes that came during the run", so_far.joined, run=run)
        to.counter("dropped_contributions", "contributions that were too old (mode async)", so_far.dropped, run=run)
        for steps, number in so_far.staleness.items():
            to.counter("contributions", "contributions by their age in steps (mode async)", number, run=run, staleness=steps)
        to.counter("damaged_lines", "lines of history.jsonl that cannot be read", so_far.damaged, run=run)
        # Before the first round: when the run was made, so that one that never begins is noticed as well.
        when = _written(path / HISTORY)
        to.gauge("last_round_timestamp_seconds", "when the newest round ended, in Unix time", when, run=run)
        to.gauge(
            "round_seconds", "seconds of the newest round; 0 before the first", float(so_far.last.get("seconds", 0)), run=run
        )
        if so_far.last:
            self._newest_of(to, run, so_far)

    @staticmethod
    def _newest_of(to: "_Families", run: str, so_far: RunSoFar) -> None:
        last, nodes = so_far.last, so_far.last["nodes"]
        to.gauge("train_loss", "mean query loss of the newest round", _number(last["train"]["loss"]), run=run)
        for (metric, when), value in so_far.scores.items():
            text = "newest mean over the validation users, before and after adaptation"
            to.gauge("validation_score", text, value, run=run, metric=metric, when=when)
        counts = {"asked": nodes["asked"], "answered": nodes["answered"], "away": len(nodes["away"])}
        for state, number in counts.items():
            to.gauge("nodes", "messages and nodes of the newest round", int(number), run=run, state=state)
        if "connected" in nodes:
            text = "nodes that the SuperLink has a connection with, as the run saw it last"
            to.gauge("connected_nodes", text, int(nodes["connected"]), run=run)
        for kind, held in last.get("memory", {}).items():
            to.gauge("server_memory_bytes", "bytes of the server's process, now and at most", int(held), run=run, kind=kind)
        if last.get("privacy"):
            to.gauge("epsilon", "what the run has spent of its privacy", _number(last["privacy"]["epsilon"]), run=run)
        if last.get("virtual_hours") is not None:
            to.gauge("virtual_hours", "hours of virtual time (setting devices)", float(last["virtual_hours"]), run=run)

    def _directories(self) -> list[Path]:
        """Return the directories of the runs that were written to last, and of all that are going on."""
        found = sorted(
            (file.parent for file in self._runs.rglob(CONFIG)), key=lambda path: _written(path / HISTORY), reverse=True
        )
        return sorted(path for at, path in enumerate(found) if at < self._newest or is_locked(path))

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
    """Families of metrics, made when the first value of one is added."""

    def __init__(self) -> None:
        self._made: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}

    def gauge(self, name: str, text: str, value: float, **labels: str) -> None:
        self._add(GaugeMetricFamily, name, text, value, labels)

    def counter(self, name: str, text: str, value: float, **labels: str) -> None:
        self._add(CounterMetricFamily, name, text, value, labels)

    def _add(self, kind: Any, name: str, text: str, value: float, labels: dict[str, str]) -> None:
        if name not in self._made:
            self._made[name] = kind(f"quickbloom_{name}", text, labels=list(labels))
        self._made[name].add_metric(list(labels.values()), float(value))

    def take(self, others: "_Families") -> None:
        """Add all values of others."""
        for name, family in others._made.items():
            if name in self._made:
                self._made[name].samples += family.samples
            else:
                self._made[name] = family

    def all(self) -> Iterator[Metric]:
        yield from self._made.values()


def _written(file: Path) -> float:
    """Return when a file was written to last, or that beside it which every run has; 0 if it has gone."""
    for path in (file, file.with_name(CONFIG)):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0


def _state(path: Path) -> str:
    if (path / "summary.json").exists():
        return "ended"
    return "going-on" if is_locked(path) else "stopped"


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: float | None) -> float:
    """A number of a file, in which null stands for what is not finite."""
    return float("nan") if value is None else float(value)
