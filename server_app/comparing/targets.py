"""How soon: a run's validation scores by rounds and bytes, and where they reach a target that all runs share."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quickbloom.common.metric import Metric
from quickbloom.server_app.comparing import modes

_BASELINE = "fedavg"
DIGITS = 7
"""As in summary.json: history.jsonl has more, and a run has to reach the target that is its own last score."""


def curve(rounds: Sequence[Mapping[str, Any]], metric: Metric) -> list[list[float]]:
    """[round, validation score, bytes up and down so far] of every evaluation.

    The score is that of the step that was best in that round, as at the end of a run.
    """
    points, sent, until = [], 0, {}
    for record in rounds:
        sent += record["bytes"]["up"] + record["bytes"]["down"]
        until[record["round"]] = sent
        found = record.get("validation", {})
        scores = [value for value in found.get(metric.name, [])[1:] if value is not None]
        if scores:
            number = found.get("round", record["round"])  # in mode async scores come in later
            points.append([number, round(metric.best(scores), DIGITS), until.get(number, sent)])
    return sorted(points)


def default_target(rows: Sequence[Mapping[str, Any]], metric: Metric) -> tuple[float | None, str]:
    """(validation score, where it comes from): what fedavg ends at, mean over seeds; else what the worst ends at."""
    waiting = [row for row in rows if row.get("mode") != modes.ASYNC] or rows
    ends = {modes.title(row): mean_of([run.get("validation") for run in row["runs"] if not run["failure"]]) for row in waiting}
    known = {name: end for name, end in ends.items() if end is not None}
    if not known:
        return None, "no run has a score"
    name = _BASELINE if _BASELINE in known else max(known, key=lambda name: metric.cost(known[name]))
    over = ", mean over seeds" if any(len(row["runs"]) > 1 for row in rows) else ""
    return round(known[name], DIGITS), f"what {name} ends at{over}"


def to_target(points: Sequence[Sequence[float]], target: float | None, metric: Metric) -> tuple[int | None, int | None]:
    """(rounds, bytes) to the first evaluation that is at least as good as the target; (None, None) if there is none."""
    for number, score, sent in points:
        if target is not None and metric.reaches(score, target):
            return int(number), int(sent)
    return None, None


def mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def sd_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None
