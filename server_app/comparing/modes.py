"""The modes sync and async beside each other: when each was as good as the rounds that wait ended, and after how many bytes.

Every asynchronous run has the synchronous one of the same algorithm and seed beside it, and what that one's validation score
was at its end is what both are timed to. Time is that of simulated devices where there are some, else the clock's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quickbloom.common.config.checks import ASYNC_ALONE
from quickbloom.common.config.key_value import split_assignment
from quickbloom.common.formatting import size
from quickbloom.common.metric import Metric, named

SYNC, ASYNC = "sync", "async"
OF_ROUNDS = ("over-select", "min-replies")
"""Settings of rounds that wait, which mode async refuses."""
_TOLD = ("after", "validation", "time", "time_to_sync", "ratio", "bytes_to_sync")

Figures = dict[str, Any]


def settings_for(mode: str, settings: Sequence[str]) -> tuple[str, ...]:
    """Return texts "key=value" for runs in `mode`: those that all runs share, without what is for the other; "": all."""
    if not mode:
        return tuple(settings)
    return (*(text for text in settings if text not in left_out(mode, settings)), f"mode={mode}")


def left_out(mode: str, settings: Sequence[str]) -> list[str]:
    """Return the texts "key=value" that runs in `mode` do without."""
    others = OF_ROUNDS if mode == ASYNC else ASYNC_ALONE
    return [text for text in settings if split_assignment(text)[0] in others]


def remark(modes: Sequence[str], settings: Sequence[str]) -> str:
    """Return a sentence on what asynchronous runs do without; "" if there is nothing."""
    keys = dict.fromkeys(split_assignment(text)[0] for text in left_out(ASYNC, settings) if ASYNC in modes)
    said = " and ".join(f"`{key}`" for key in keys)
    return f"{said} {'are' if len(keys) > 1 else 'is'} for rounds that wait: the async runs go without" if keys else ""


def timeline(rounds: Sequence[Mapping[str, Any]], metric: Metric, steps: int, digits: int = 7) -> list[list[float]]:
    """Return [round, validation score, bytes up and down so far, time] of every evaluation, in the order of rounds.

    The score is that of the step that was best then, of the first `steps` alone: where `adapt-steps` grows, it does so at the
    end of a run, and scores are to be comparable all along. Time: virtual hours where the lines have them, else seconds.
    """
    sent, seconds, known = 0, 0.0, {}
    for record in rounds:
        sent += record["bytes"]["up"] + record["bytes"]["down"]
        seconds += record["seconds"]
        known[record["round"]] = sent, record.get("virtual_hours", round(seconds, 4))
    points = []
    for record in rounds:
        found = record.get("validation", {})
        scores = [value for value in found.get(metric.name, [])[1 : steps + 1] if value is not None]
        if scores:
            # In mode async scores come in when the model has gone on: what counts is when it was there.
            number = found.get("round", record["round"])
            points.append([number, round(metric.best(scores), digits), *known.get(number, known[record["round"]])])
    return sorted(points)


def beside_sync(rows: Sequence[Mapping[str, Any]], metric: Metric, unit: str) -> Figures:
    """Return "modes" of comparison.json. `rows`: of the algorithms in every mode, each with `runs`, and these with `timeline`.

    Every run gets `time` (at its end), and, where the run in mode sync has a score, `time_to_sync` and `bytes_to_sync` until
    it was as good as that one's end, and `ratio` of its time to that of the run in mode sync; None if it never was.
    """
    ends = {(title(row), run["seed"]): run for row in rows if row["mode"] == SYNC for run in row["runs"]}
    for row in rows:
        for run in row["runs"]:
            _time(run, ends.get((title(row), run["seed"])), metric)
    return {"unit": unit, "rows": [_over_seeds(row) for row in rows]}


def title(row: Mapping[str, Any]) -> str:
    """Return what a row is called, without its mode: its name, else its algorithm."""
    return str(row.get("name") or row["algorithm"])


def _time(run: Figures, sync: Figures | None, metric: Metric) -> None:
    points = (sync or {}).get("timeline") or []
    target = points[-1][1] if points else None
    own, waited = (_reached(one.get("timeline") or [], target, metric) for one in (run, sync or {}))
    run["time_to_sync"], run["bytes_to_sync"] = own or (None, None)
    run["ratio"] = own[0] / waited[0] if own and waited and waited[0] else None


def _reached(points: Sequence[Sequence[float]], target: float | None, metric: Metric) -> tuple[float, int] | None:
    """(time, bytes) at the first evaluation that is at least as good as the target."""
    for _, score, sent, time in points:
        if target is not None and metric.reaches(score, target):
            return time, int(sent)
    return None


def _over_seeds(row: Mapping[str, Any]) -> Figures:
    done = [run for run in row["runs"] if not run["failure"]]
    columns = {name: [run[name] for run in done if run.get(name) is not None] for name in _TOLD}
    return {
        "algorithm": row["algorithm"],
        "name": title(row),
        "mode": row["mode"],
        "reached": len(columns["time_to_sync"]),
        "mean": {name: float(np.mean(values)) if values else None for name, values in columns.items()},
        "sd": {name: float(np.std(values, ddof=1)) if len(values) > 1 else None for name, values in columns.items()},
    }


# ---- the table


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of cells) of a comparison with modes."""
    metric, found = named(result["metric"]), result["modes"]
    unit, seeds = found["unit"], len(result["seeds"])
    headings = ["algorithm", "mode", f"test {metric.title}", f"validation {metric.title}", unit]
    headings += [f"{unit} to sync's score", "ratio to sync", "bytes until then"]
    rows = []
    for row in found["rows"]:
        mean, sd = row["mean"], row["sd"]
        scores = [metric.number(mean[name], sd[name]) if mean[name] is not None else "-" for name in ("after", "validation")]
        until = _number(mean["time_to_sync"], sd["time_to_sync"])
        until += f" ({row['reached']} of {seeds})" if row["reached"] and seeds > 1 else ""
        sent = "-" if mean["bytes_to_sync"] is None else size(mean["bytes_to_sync"])
        rows.append([title(row), row["mode"], *scores, _number(mean["time"], sd["time"]), until])
        rows[-1] += [_number(mean["ratio"], sd["ratio"]), sent]
    return headings, rows


def _number(mean: float | None, sd: float | None) -> str:
    return "-" if mean is None else f"{mean:.3g}" + (f" ± {sd:.2g}" if sd is not None else "")


def caption(result: Mapping[str, Any]) -> list[str]:
    """What one has to know to read the table, in sentences; [] without modes."""
    found = result["modes"]
    if not found:
        return []
    said = [
        f"Modes: {found['unit']} to sync's score are those until the first evaluation on the validation tasks, after at most "
        f"{found['steps']} steps of adaptation, that is at least as good as the last one of the run in mode sync of the same "
        "algorithm and seed; bytes: up and down until then."
    ]
    if found["remark"]:
        said.append(f"{found['remark'][0].upper()}{found['remark'][1:]}.")
    if found["unit"] == "seconds":
        said.append(
            "Seconds are those of this machine, whose cores all nodes share, so they tell nothing of slow devices: use "
            "`--devices`."
        )
    return said
