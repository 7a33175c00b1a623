"""The result of a comparison: figures of every run, mean and deviation over seeds, and the target."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from quickbloom import __version__
from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.baselines.scoring import BASELINES
from quickbloom.common.config.run import RunConfig
from quickbloom.common.formatting import data_name
from quickbloom.common.metric import ACCURACY, Metric, metric_of, named
from quickbloom.common.spreadsheets import read_csv
from quickbloom.server_app.comparing import fingerprint, modes, paired
from quickbloom.server_app.comparing.batch import Result
from quickbloom.server_app.comparing.plan import Plan
from quickbloom.server_app.comparing.searching import Entry
from quickbloom.server_app.comparing.targets import DIGITS, curve, default_target, mean_of, sd_of, to_target
from quickbloom.server_app.comparing.variants import at_the_edge
from quickbloom.server_app.comparing.watching import inner_lr, validation_score

STEPS = (1, 5, 10)
"""Numbers of adaptation steps that the table shows, as far as `adapt-steps` goes."""
_AVERAGED = ("validation", "before", *(f"after_{step}" for step in STEPS), "after", "worst10")
SEEN = {"seen_before": "seen, before", "seen_after": "seen, chosen step", "seen_worst10": "seen, worst 10 %"}
"""Scores of training tasks as seen users, with their headings."""
_AVERAGED = (*_AVERAGED, "weighted", *SEEN, "seen_weighted", "rounds_to_target", "bytes_to_target", "seconds")

Figures = dict[str, Any]


def assemble(plan: Plan, entries: Sequence[Entry], target: float | None) -> dict[str, Any]:
    """What comparison.json holds. `target`: a validation score; None lets the algorithms' own results decide."""
    config = plan.first().config()
    rows = [_row(plan, entry, config.first_steps) for entry in entries]
    done = [run for row in rows for run in row["runs"] if not run["failure"]]
    metric = named(done[0]["metric"]) if done else ACCURACY
    value, origin = (target, "as asked") if target is not None else default_target(rows, metric)
    for row in rows:
        for run in row["runs"]:
            run["rounds_to_target"], run["bytes_to_target"] = to_target(run.get("curve", []), value, metric)
        row |= _over_seeds(row["runs"])
    tests = _tests(entries, rows, metric)
    for row in rows:
        row["mean_rank"] = tests["ranks"].get(label(row))
    return {
        "schema": 1,
        "dataset": plan.dataset,
        "data": data_name(config.flat()),
        "metric": metric.name,
        "seeds": list(plan.seeds),
        "tasks": done[0]["tasks"] if done else {},
        "nodes": plan.nodes,
        "evaluate_every": config.evaluate_every,
        "adapt_lrs": [float(lr) for lr in plan.adapt_lrs.split(",")],
        "target": {"validation": value, "origin": origin},
        "algorithms": rows,
        "paired": tests,
        "modes": _modes(plan, rows, metric, config) if plan.modes else None,
        "baselines": _baselines(rows),
        "command": plan.command() + (f" --target-score {target:g}" if target is not None else ""),
        **fingerprint.facts(plan.parts()),
        "version": __version__,
    }


def label(row: Mapping[str, Any]) -> str:
    """What names a row: its name, and the mode where modes are compared: "maml, async"."""
    return ", ".join(filter(None, (modes.title(row), row.get("mode"))))


def _tests(entries: Sequence[Entry], rows: Sequence[dict[str, Any]], metric: Metric) -> dict[str, Any]:
    """Every row against every other, over the seeds and users that both have."""
    scores, means = {}, {}
    for entry, row in zip(entries, rows, strict=True):
        scored = {
            run["seed"]: run["seen_after"] if run["after"] is None else run["after"]
            for run in row["runs"]
            if not run["failure"]
        }
        done = {seed: value for seed, value in scored.items() if value is not None}
        chosen = {seed: result for seed, result in entry.chosen.items() if result and seed in done}
        scores[label(row)] = {seed: of_users(result, metric) for seed, result in chosen.items()}
        means[label(row)] = done
    return paired.compared(scores, means, metric)


def of_users(result: Result, metric: Metric) -> dict[str, float]:
    """The score of every test user after the chosen step, or where there are none of every seen one; {} if none is written."""
    file, column = result.run.directory / "per_task.csv", f"{metric.name}_step{result.summary['chosen']['adapt_steps']}"
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as opened:
        split = "test" if result.summary["test"] else "seen"
        rows = [row for row in read_csv(opened) if row["split"] == split]
    return {row["task"]: float(row[column]) for row in rows if row.get(column, "") not in ("", "nan")}


def _modes(plan: Plan, rows: Sequence[dict[str, Any]], metric: Metric, config: RunConfig) -> dict[str, Any]:
    found = modes.beside_sync(rows, metric, "virtual hours" if config.devices else "seconds")
    return {**found, "steps": config.first_steps, "remark": modes.remark(plan.modes, plan.settings)}


def _row(plan: Plan, entry: Entry, steps: int) -> dict[str, Any]:
    """`steps`: those of adaptation after which modes are compared while they train."""
    results = entry.all_tried
    name = entry.name or entry.algorithm
    row = plan.rows[name]
    # Where no candidate of a seed worked, the first shows why.
    taken = [chosen or entry.tried[seed][0] for seed, chosen in entry.chosen.items()]
    runs = [figures(result) | (_timed(result, steps) if entry.mode else {}) for result in taken]
    searched = plan.searched(name)
    for run, result in zip(runs, taken, strict=True):
        run["settings"] = _of(searched, result)
    return {
        "algorithm": entry.algorithm,
        "name": name,
        "mode": entry.mode,
        "settings": list(row.settings),
        "rate": _origin(entry),
        "tried": [
            _attempt(result) | {"rounds": result.run.setup.rounds, "settings": _of(searched, result)} for result in results
        ],
        "edge": [run["seed"] for run in runs if _is_edge(run, results)],
        "edges": {key: [run["seed"] for run in runs if _at_edge(run, key, values)] for key, values in searched.items()},
        "grid": {key: list(values) for key, values in searched.items()},
        "configuration": _shared([result.run.setup.effective() for result in results]) | {"rounds": taken[0].run.setup.rounds},
        "runs": runs,
    }


def _of(searched: Mapping[str, Sequence[str]], result: Result) -> dict[str, Any]:
    """What a run has of the settings of the grid."""
    effective = result.run.setup.config().flat()
    return {key: effective.get(key) for key in searched}


def _at_edge(run: Figures, key: str, values: Sequence[str]) -> bool:
    return not run["failure"] and at_the_edge(str(run["settings"][key]), values)


def _timed(result: Result, steps: int) -> Figures:
    """The evaluations of a run with their time, and the time at its end."""
    if failure(result):
        return {}
    rounds, summary = result.rounds, result.summary
    hours = summary.get("virtual_hours")
    end = sum(record["seconds"] for record in rounds) if hours is None else hours
    return {"timeline": modes.timeline(rounds, metric_of(_scored(summary)), steps, DIGITS), "time": end}


def _attempt(result: Result) -> Figures:
    run, score = result.run, validation_score(result)
    tried: Figures = {"seed": run.seed, "inner_lr": inner_lr(run.setup), "validation": score[0] if score else None}
    return tried | {"failure": failure(result)}


def _origin(entry: Entry) -> str:
    """Where the inner rate comes from: "chosen" among several, "given" as the only one, or "unused"."""
    if len({inner_lr(result.run.setup) for result in entry.all_tried}) > 1:
        return "chosen"
    return "given" if ALGORITHMS[entry.algorithm].tunes_inner_lr else "unused"


def _is_edge(run: Figures, results: Sequence[Result]) -> bool:
    """Whether the rate that was chosen is the lowest or the highest of several: a better one may lie beyond."""
    rates = {rate for result in results if (rate := inner_lr(result.run.setup)) is not None}
    return len(rates) > 1 and not run["failure"] and run["inner_lr"] in (min(rates), max(rates))


def _shared(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings that are the same everywhere: all but what was searched."""
    first, *others = settings
    return {key: value for key, value in first.items() if all(key in other and other[key] == value for other in others)}


def failure(result: Result) -> str:
    """Why a run has no scores; "" if it has."""
    if result.code:
        return result.failure
    chosen = validation_score(result) is not None or not (result.summary["validation"] or result.summary["test"])
    if not chosen or _after(result.summary) is None:
        return "diverged: its scores are not finite"
    return ""


def figures(result: Result) -> Figures:
    """What is told of one run: test scores as fractions or mse at the chosen step, times in seconds, the validation curve.

    A run that failed has "failure", "seed", "inner_lr", "directory" and "command" alone.
    """
    run = result.run
    known: Figures = {"seed": run.seed, "inner_lr": inner_lr(run.setup), "directory": run.directory.name}
    known |= {"command": shlex.join(run.setup.command(run.seed)), "failure": failure(result)}
    if known["failure"]:
        return known
    summary = result.summary
    metric, step = metric_of(_scored(summary)), summary["chosen"]["adapt_steps"]
    scores, (validation, _) = (summary["test"] or {}).get(metric.name), validation_score(result) or (None, None)
    shots = summary.get("shots") or {"shots": [], metric.name: {"mean": []}}
    return known | {
        "metric": metric.name,
        "tasks": summary["tasks"],
        "adapt_lr": summary["chosen"]["adapt_lr"] if ALGORITHMS[run.setup.algorithm].uses_adapt_lr else None,
        "adapt_steps": step,
        "validation": validation,
        **{f"after_{k}": scores["mean"][k] if scores and k < len(scores["mean"]) else None for k in STEPS},
        **_ends(scores, step),
        **{f"seen_{name}": value for name, value in _ends((summary.get("seen") or {}).get(metric.name), step).items()},
        "steps": scores["mean"] if scores else [],
        "shots": dict(zip(map(str, shots["shots"]), shots[metric.name]["mean"], strict=True)),
        "curve": curve(result.rounds, metric),
        "seconds": summary["seconds"]["total"],
        "baselines": _of_baselines(summary, metric),
    }


def _scored(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of the test tasks; of a run in which all tasks trained those of seen users; {} where there are none."""
    return summary["test"] or summary.get("seen") or {}


def _ends(scores: Mapping[str, Any] | None, step: int) -> Figures:
    """Mean scores before adaptation and at the chosen step, there also over examples and of the worst tenth."""
    if not scores:
        return dict.fromkeys(("before", "after", "weighted", "worst10"))
    after = {"after": scores["mean"][step], "worst10": scores["worst10"][step]}
    return {"before": scores["mean"][0], **after, "weighted": scores["weighted"][step] if "weighted" in scores else None}


def _of_baselines(summary: Mapping[str, Any], metric: Metric) -> dict[str, dict[str, float]]:
    """Mean over the test tasks and worst tenth of every baseline."""
    found = (summary.get("baselines") or {}).get("scores", {}).get(metric.name, {})
    return {one: {"after": found[one]["mean"], "worst10": found[one]["worst10"]} for one in BASELINES if one in found}


def _baselines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every baseline; all algorithms have the same, so the first decides."""
    runs: dict[int, dict[str, dict[str, float]]] = {}
    for run in (run for row in rows for run in row["runs"] if not run["failure"]):
        if run["baselines"]:
            runs.setdefault(run["seed"], run["baselines"])
    found = []
    for name in BASELINES:
        of_seeds = [one[name] for one in runs.values() if name in one]
        if of_seeds:
            columns = {part: [one[part] for one in of_seeds] for part in ("after", "worst10")}
            parts = {"mean": mean_of, "sd": sd_of}
            found.append(
                {"baseline": name} | {key: {part: over(columns[part]) for part in columns} for key, over in parts.items()}
            )
    return found


def _over_seeds(runs: Sequence[Figures]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) of what is known over the runs that did not fail."""
    done = [run for run in runs if not run["failure"]]
    columns = {name: [run.get(name) for run in done] for name in _AVERAGED}
    return {
        "failed": len(runs) - len(done),
        "reached": sum(run["rounds_to_target"] is not None for run in done),
        "mean": {name: mean_of(values) for name, values in columns.items()},
        "sd": {name: sd_of(values) for name, values in columns.items()},
    }


def _after(summary: Mapping[str, Any]) -> float | None:
    scored = _scored(summary)
    if not scored:
        return None
    value = scored[metric_of(scored).name]["mean"][summary["chosen"]["adapt_steps"]]
    return None if value is None or not math.isfinite(value) else value
