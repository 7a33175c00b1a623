"""The result of a comparison: figures of every run, mean and deviation over seeds, the target, and the table."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from quickbloom import __version__
from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.baselines.scoring import BASELINES
from quickbloom.common.config.run import RunConfig
from quickbloom.common.formatting import data_name, size
from quickbloom.common.metric import ACCURACY, Metric, metric_of, named
from quickbloom.server_app.comparing import modes
from quickbloom.server_app.comparing.batch import Result
from quickbloom.server_app.comparing.plan import Entry, Plan, inner_lr, validation_score
from quickbloom.server_app.reporting.against_baselines import in_words, title_of
from quickbloom.server_app.runs.directory import RunDirectory

STEPS = (1, 5, 10)
"""Numbers of adaptation steps that the table shows, as far as `adapt-steps` goes."""
_AVERAGED = ("validation", "before", *(f"after_{step}" for step in STEPS), "after", "worst10")
_SEEN = {"seen_before": "seen, before", "seen_after": "seen, chosen step", "seen_worst10": "seen, worst 10 %"}
"""Scores of training tasks as seen users, with their headings."""
_AVERAGED = (*_AVERAGED, "weighted", *_SEEN, "seen_weighted", "rounds_to_target", "bytes_to_target", "seconds")
_BASELINE = "fedavg"
_DIGITS = 7
"""As in summary.json: history.jsonl has more, and a run has to reach the target that is its own last score."""

Figures = dict[str, Any]


def assemble(plan: Plan, entries: Sequence[Entry], target: float | None) -> dict[str, Any]:
    """What comparison.json holds. `target`: a validation score; None lets the algorithms' own results decide."""
    config = plan.candidates(plan.algorithms[0])[0].config()
    rows = [_row(entry, config.first_steps) for entry in entries]
    done = [run for row in rows for run in row["runs"] if not run["failure"]]
    metric = named(done[0]["metric"]) if done else ACCURACY
    value, origin = (target, "as asked") if target is not None else default_target(rows, metric)
    for row in rows:
        for run in row["runs"]:
            run["rounds_to_target"], run["bytes_to_target"] = to_target(run.get("curve", []), value, metric)
        row |= _over_seeds(row["runs"])
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
        "modes": _modes(plan, rows, metric, config) if plan.modes else None,
        "baselines": _baselines(rows),
        "command": plan.command() + (f" --target-score {target:g}" if target is not None else ""),
        "version": __version__,
    }


def _modes(plan: Plan, rows: Sequence[dict[str, Any]], metric: Metric, config: RunConfig) -> dict[str, Any]:
    found = modes.beside_sync(rows, metric, "virtual hours" if config.devices else "seconds")
    return {**found, "steps": config.first_steps, "remark": modes.remark(plan.modes, plan.settings)}


def _row(entry: Entry, steps: int) -> dict[str, Any]:
    """`steps`: those of adaptation after which modes are compared while they train."""
    results = [result for tried in entry.tried.values() for result in tried]
    # Where no rate of a seed worked, the first shows why.
    taken = [chosen or entry.tried[seed][0] for seed, chosen in entry.chosen.items()]
    runs = [figures(result) | (_timed(result, steps) if entry.mode else {}) for result in taken]
    return {
        "algorithm": entry.algorithm,
        "mode": entry.mode,
        "rate": _origin(entry),
        "tried": [_attempt(result) for result in results],
        "edge": [run["seed"] for run in runs if _is_edge(run, results)],
        "configuration": _shared([result.run.setup.effective() for result in results]),
        "runs": runs,
    }


def _timed(result: Result, steps: int) -> Figures:
    """The evaluations of a run with their time, and the time at its end."""
    if failure(result):
        return {}
    rounds, summary = result.rounds, result.summary
    hours = summary.get("virtual_hours")
    end = sum(record["seconds"] for record in rounds) if hours is None else hours
    return {"timeline": modes.timeline(rounds, metric_of(_scored(summary)), steps, _DIGITS), "time": end}


def _attempt(result: Result) -> Figures:
    run, score = result.run, validation_score(result)
    tried: Figures = {"seed": run.seed, "inner_lr": inner_lr(run.setup), "validation": score[0] if score else None}
    return tried | {"failure": failure(result)}


def _origin(entry: Entry) -> str:
    """Where the inner rate comes from: "chosen" among several, "given" as the only one, or "unused"."""
    if any(len(tried) > 1 for tried in entry.tried.values()):
        return "chosen"
    return "given" if ALGORITHMS[entry.algorithm].tunes_inner_lr else "unused"


def _is_edge(run: Figures, results: Sequence[Result]) -> bool:
    """Whether the rate that was chosen is the lowest or the highest of several: a better one may lie beyond."""
    rates = {rate for result in results if (rate := inner_lr(result.run.setup)) is not None}
    return len(rates) > 1 and not run["failure"] and run["inner_lr"] in (min(rates), max(rates))


def _shared(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings that are the same everywhere: all but the inner rate, if it was searched."""
    first, *others = settings
    return {key: value for key, value in first.items() if all(other[key] == value for other in others)}


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
            parts = {"mean": _mean, "sd": _sd}
            found.append(
                {"baseline": name} | {key: {part: over(columns[part]) for part in columns} for key, over in parts.items()}
            )
    return found


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
            points.append([number, round(metric.best(scores), _DIGITS), until.get(number, sent)])
    return sorted(points)


def default_target(rows: Sequence[Mapping[str, Any]], metric: Metric) -> tuple[float | None, str]:
    """(validation score, where it comes from): what fedavg ends at, mean over seeds; else what the worst ends at."""
    waiting = [row for row in rows if row.get("mode") != modes.ASYNC] or rows
    ends = {row["algorithm"]: _mean([run.get("validation") for run in row["runs"] if not run["failure"]]) for row in waiting}
    known = {name: end for name, end in ends.items() if end is not None}
    if not known:
        return None, "no run has a score"
    name = _BASELINE if _BASELINE in known else max(known, key=lambda name: metric.cost(known[name]))
    over = ", mean over seeds" if any(len(row["runs"]) > 1 for row in rows) else ""
    return round(known[name], _DIGITS), f"what {name} ends at{over}"


def to_target(points: Sequence[Sequence[float]], target: float | None, metric: Metric) -> tuple[int | None, int | None]:
    """(rounds, bytes) to the first evaluation that is at least as good as the target; (None, None) if there is none."""
    for number, score, sent in points:
        if target is not None and metric.reaches(score, target):
            return int(number), int(sent)
    return None, None


def _over_seeds(runs: Sequence[Figures]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) of what is known over the runs that did not fail."""
    done = [run for run in runs if not run["failure"]]
    columns = {name: [run.get(name) for run in done] for name in _AVERAGED}
    return {
        "failed": len(runs) - len(done),
        "reached": sum(run["rounds_to_target"] is not None for run in done),
        "mean": {name: _mean(values) for name, values in columns.items()},
        "sd": {name: _sd(values) for name, values in columns.items()},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _sd(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None


def _after(summary: Mapping[str, Any]) -> float | None:
    scored = _scored(summary)
    if not scored:
        return None
    value = scored[metric_of(scored).name]["mean"][summary["chosen"]["adapt_steps"]]
    return None if value is None or not math.isfinite(value) else value


# ---- the table


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of cells), the same for the terminal, Markdown and HTML."""
    columns = _columns(result["algorithms"])
    headings = ["algorithm", "inner lr", "adapt lr x steps", *columns.values()]
    headings += ["rounds to target", "bytes to target", "seconds"]
    scored = list(columns)
    rows = []
    for row in result["algorithms"]:
        cells = [_name(row), _span(row["runs"], "inner_lr"), _adaptation(row["runs"])]
        cells += [_score(row, name, named(result["metric"])) for name in scored]
        reached = f" ({row['reached']} of {len(row['runs'])})" if row["reached"] and len(result["seeds"]) > 1 else ""
        cells.append(_plain(row, "rounds_to_target") + reached)
        sent = row["mean"]["bytes_to_target"]
        rows.append([*cells, "-" if sent is None else size(sent), _plain(row, "seconds")])
    metric = named(result["metric"])
    for row in result.get("baselines", []):
        scores = {"after": _score(row, "after", metric), "worst10": _score(row, "worst10", metric)}
        cells = [scores.get(name, "-") for name in scored]
        rows.append([title_of(row["baseline"], metric), "-", "-", *cells, "-", "-", "-"])
    return headings, rows


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The scores that the table shows, with their headings: of unseen users, of seen ones, or of both."""

    def is_known(name: str) -> bool:
        return any(row["mean"].get(name) is not None for row in rows)

    after = {f"after_{k}": f"{k} step{'s' * (k > 1)}" for k in STEPS if is_known(f"after_{k}")}
    unseen = {"before": "before", **after, "after": "chosen step", "worst10": "worst 10 %"}
    seen = _SEEN if is_known("seen_after") else {}
    return {**(unseen if is_known("after") or not seen else {}), **seen}


def caption(result: Mapping[str, Any]) -> list[str]:
    """What one has to know to read the table, in sentences."""
    metric, seeds, target = named(result["metric"]), result["seeds"], result["target"]["validation"]
    what = metric.heading if metric.higher_is_better else f"{metric.heading} (lower is better)"
    over = f"mean ± standard deviation over the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    tasks, columns = result["tasks"], _columns(result["algorithms"])
    on = f"{tasks.get('test', 0)} held-out test tasks" if "after" in columns else f"{tasks.get('train', 0)} training tasks"
    sentences = [f"{result['data']}: {what} on {on}, {over}."]
    if "seen_after" in columns:
        sentences.append("Seen: training tasks, on test examples of their own, from what they keep on their nodes.")
    sentences += [*_ranked(result, metric), *_choices(result)]
    if target is not None:
        nodes = result["nodes"]
        sentences.append(
            f"Target: validation {metric.name} {target:.4g} ({result['target']['origin']}), looked at when a run evaluates, "
            f"every {result['evaluate_every']} rounds and after the last; bytes: tensors up and down until then, evaluations "
            f"included, with {nodes} node{'s' * (nodes > 1)}"
            + ("; in brackets: seeds that reached it, over which the mean is." if len(seeds) > 1 else ".")
        )
    return [*sentences, *modes.caption(result)]


def _ranked(result: Mapping[str, Any], metric: Metric) -> list[str]:
    """All of them with the baselines, the best first."""
    ends = {name_of(row): row["mean"]["after"] for row in result["algorithms"]}
    beside = {in_words(row["baseline"], metric): row["mean"]["after"] for row in result.get("baselines", [])}
    known = {name: end for name, end in (ends | beside).items() if end is not None}
    if not known.keys() & beside.keys():
        return []
    ordered = sorted(known, key=lambda name: metric.cost(known[name]))
    return ["The best first, with baselines: " + "; ".join(f"{name} {metric.score(known[name])}" for name in ordered) + "."]


def _choices(result: Mapping[str, Any]) -> list[str]:
    """What was chosen, out of what, and for which algorithms it was not."""
    rows, own = result["algorithms"], ", by each seed on its own" if len(result["seeds"]) > 1 else ""
    grid = ", ".join(f"{lr:g}" for lr in result["adapt_lrs"])
    chosen = f"Chosen on the validation tasks{own}, for every algorithm alike: "
    sentences = [f"{chosen}the rate (of {grid}) and the number of steps of adaptation."]
    if result["tasks"].get("validation") == 0:
        sentences = ["There are no validation tasks to choose on: all adapt with their inner rate, in `adapt-steps` steps."]
    by_origin = {origin: [row for row in rows if row["rate"] == origin] for origin in ("chosen", "given", "unused")}
    if searched := by_origin["chosen"]:
        rates = ", ".join(f"{lr:g}" for lr in dict.fromkeys(tried["inner_lr"] for tried in searched[0]["tried"]))
        sentences.append(f"Chosen there as well, the inner rate of training (of {rates}): {_names(searched)}.")
    if by_origin["given"]:
        sentences.append(f"Inner rate given, not searched: {_names(by_origin['given'])}.")
    if by_origin["unused"]:
        sentences.append(f"Without an inner rate of training: {_names(by_origin['unused'])}.")
    if edges := [row for row in searched if row["edge"]]:
        sentences.append(
            "At the lowest or highest of the inner rates that were tried, so that a wider range (`--inner-lrs`) may do better: "
            + "; ".join(f"{name_of(row)}, seed{'s' * (len(row['edge']) > 1)} {_listed(row['edge'])}" for row in edges)
            + "."
        )
    return sentences


def _names(rows: Sequence[Mapping[str, Any]]) -> str:
    return _listed(list(dict.fromkeys(row["algorithm"] for row in rows)))


def name_of(row: Mapping[str, Any]) -> str:
    """What names a row: the algorithm, and the mode where modes are compared: "maml, async"."""
    return ", ".join(filter(None, (str(row["algorithm"]), row.get("mode"))))


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def failures(result: Mapping[str, Any]) -> list[str]:
    """A sentence for every run without scores."""
    lines = []
    for row in result["algorithms"]:
        seen = [(run["inner_lr"], run["seed"], run["failure"]) for run in (*row["tried"], *row["runs"])]
        for rate, seed, reason in dict.fromkeys(item for item in seen if item[2]):
            with_rate = "" if rate is None else f"inner lr {rate:g}, "
            lines.append(f"{name_of(row)}, {with_rate}seed {seed}: {reason}")
    return lines


def write(result: Mapping[str, Any], directory: Path) -> None:
    """comparison.json and comparison.md, each written whole or not at all."""
    writer = RunDirectory(directory)
    writer.write_json("comparison.json", result)
    writer.write_text("comparison.md", markdown(result))


def rich_table(result: Mapping[str, Any]) -> Table:
    """The table for a terminal; the caption goes below it."""
    return _for_terminal(*table(result))


def rich_table_of_modes(result: Mapping[str, Any]) -> Table:
    """The table of the modes for a terminal."""
    return _for_terminal(*modes.table(result))


def _for_terminal(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    built = Table()
    for heading in headings:
        built.add_column(heading, justify="left" if heading in ("algorithm", "mode") else "right")
    for cells in rows:
        built.add_row(*cells)
    return built


def markdown(result: Mapping[str, Any]) -> str:
    """comparison.md: the table, how to read it, and how to repeat it."""
    lines = _in_markdown(*table(result))
    if result["modes"]:
        lines += ["", *_in_markdown(*modes.table(result))]
    lines += ["", *caption(result)]
    lines += ["", *(f"- {line}" for line in failures(result))] if failures(result) else []
    return "\n".join([*lines, "", "To repeat it:", "", f"    {result['command']}", ""])


def _in_markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", "|---|" + "---:|" * (len(headings) - 1)]
    return lines + [f"| {' | '.join(cells)} |" for cells in rows]


def _name(row: Mapping[str, Any]) -> str:
    if not row["failed"]:
        return name_of(row)
    return f"{name_of(row)} ({row['failed']} of {len(row['runs'])} failed)"


def _adaptation(runs: Sequence[Figures]) -> str:
    """Rates and numbers of steps of all seeds: "0.1-0.3 x 4-10"."""
    done = any(not run["failure"] for run in runs)
    return f"{_span(runs, 'adapt_lr')} x {_span(runs, 'adapt_steps')}" if done else "-"


def _span(runs: Sequence[Figures], name: str) -> str:
    """The lowest and the highest over the runs that did not fail: "0.1-0.3", or "0.3" if they are equal."""
    values = [run[name] for run in runs if not run["failure"] and run[name] is not None]
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def _score(row: Mapping[str, Any], name: str, metric: Metric) -> str:
    mean = row["mean"][name]
    return "-" if mean is None else metric.number(mean, row["sd"][name])


def _plain(row: Mapping[str, Any], name: str) -> str:
    mean, sd = row["mean"][name], row["sd"][name]
    return "-" if mean is None else f"{round(mean, 1):g}" + (f" ± {round(sd, 1):g}" if sd is not None else "")
