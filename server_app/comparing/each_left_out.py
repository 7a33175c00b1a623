"""Several algorithms with every task left out once: which runs there are, and one table, ranked by the mean over tasks.

Each fold of an algorithm is a comparison of its inner rates by validation tasks among the others, as in `plan`, and its score
is that of the task that was left out, the mean over seeds. All algorithms have the same folds, so two of them are compared by
their differences task by task: the interval of the mean difference is Student's t over tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quickbloom import __version__
from quickbloom.common.config.key_value import assignment
from quickbloom.common.errors import ConfigError
from quickbloom.common.formatting import counted, data_name
from quickbloom.common.maths.intervals import half_width
from quickbloom.common.metric import ACCURACY, Metric, named
from quickbloom.common.spreadsheets import write_csv
from quickbloom.common.system.whole_files import whole
from quickbloom.server_app.comparing import fingerprint
from quickbloom.server_app.comparing.batch import Workers
from quickbloom.server_app.comparing.fingerprint import remember
from quickbloom.server_app.comparing.leave_one_out import FILE, metric_for_all, own_of, tasks_of
from quickbloom.server_app.comparing.plan import Plan
from quickbloom.server_app.comparing.result import Figures, failure, figures
from quickbloom.server_app.comparing.searching import Entry, compare_all
from quickbloom.server_app.comparing.table import footing
from quickbloom.server_app.launch.prepare import scored_one_by_one
from quickbloom.server_app.runs.directory import RunDirectory

_LEAST = 3
"""Fewest tasks: one is left out, one chooses the rates, and one trains."""


def folds(plan: Plan, say: Callable[[str], None] = lambda sentence: None) -> dict[str, Plan]:
    """The comparison of every fold, by the task that it leaves out. Raises ConfigError if there is nothing to leave out.

    `say`: called with a sentence on tasks that the metric cannot score.
    """
    config = plan.first().config()
    if config.flat().get("own.leave-out"):
        raise ConfigError("`--leave-one-out` excludes `own.leave-out`: it leaves every task out once")
    tasks = tasks_of(config)
    if len(tasks) < _LEAST:
        raise ConfigError(
            f"`compare --leave-one-out` needs at least {_LEAST} tasks, of which one chooses the rates, the data have "
            f"{len(tasks)}: for two use `quickbloom run --leave-one-out`"
        )
    # Folds with other classes left out must not be scored by other metrics.
    metric = metric_for_all(config)
    tasks, unscored = scored_one_by_one(own_of(config), tasks, metric)
    if unscored:
        say(f"Remark: {unscored}")
    shared = (*plan.settings, assignment("metric", metric))
    return {task: replace(plan, settings=(*shared, assignment("own.leave-out", task))) for task in tasks}


def carry_out(plan: Plan, directory: Path, jobs: int | Workers, console: Console) -> dict[str, Any]:
    """Do what is not finished in `directory`, write the result there and return it. Raises CompareError."""
    parts = folds(plan, lambda sentence: console.print(escape(sentence)))
    if changed := remember(directory, plan.parts()):
        console.print(f"Remark: {changed}.", markup=False, soft_wrap=True)
    entries = compare_all(list(parts.values()), directory, jobs, console)
    result = assemble(plan, dict(zip(parts, entries, strict=True)))
    write(result, directory)
    return result


def assemble(plan: Plan, entries: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """What leave-one-out.json holds; the algorithms in order, the best first. `entries`: those of every task left out."""
    rows = [_row(name, {task: of_task[place] for task, of_task in entries.items()}) for place, name in enumerate(plan.rows)]
    done = [fold["metric"] for row in rows for fold in row["folds"] if not fold["failures"]]
    metric = named(done[0]) if done else ACCURACY
    rows = sorted((_over_tasks(row, metric) for row in rows), key=lambda row: (row["failed"], _cost(row["after"], metric)))
    for row in rows:
        row["behind"] = _behind(row, rows[0], metric)
    return {
        "schema": 1,
        "data": data_name(plan.first().config().flat()),
        "metric": metric.name,
        "seeds": list(plan.seeds),
        "tasks": list(entries),
        "algorithms": rows,
        "command": f"{plan.command()} --leave-one-out",
        **fingerprint.facts(plan.parts()),
        "version": __version__,
    }


def _cost(value: float | None, metric: Metric) -> float:
    return metric.cost(float("nan") if value is None else value)


def _row(name: str, entries: Mapping[str, Entry]) -> Figures:
    return {"algorithm": name, "folds": [_fold(task, entry) for task, entry in entries.items()]}


def _fold(task: str, entry: Entry) -> Figures:
    """The scores of a task that was left out, before and after adaptation: the mean over seeds; None if a run failed."""
    chosen = [one or entry.tried[seed][0] for seed, one in entry.chosen.items()]
    found = [figures(result) for result in chosen]
    failures = [reason for result in chosen if (reason := failure(result))]
    known: Figures = {"task": task, "failures": failures, "before": None, "after": None}
    if failures:
        return known
    known |= {name: float(np.mean([one[name] for one in found])) for name in ("before", "after")}
    return known | {
        "metric": found[0]["metric"],
        "inner_lr": [one["inner_lr"] for one in found],
        "adapt_lr": [one["adapt_lr"] for one in found],
        "adapt_steps": [one["adapt_steps"] for one in found],
        "directories": [one["directory"] for one in found],
    }


def _over_tasks(row: Figures, metric: Metric) -> Figures:
    """The row with mean and 95 % half-width over its tasks, the worst of these, and how many failed."""
    known = [fold for fold in row["folds"] if not fold["failures"]]
    scores = np.array([[fold["before"], fold["after"]] for fold in known], dtype=np.float64).reshape(-1, 2)
    worst = max(known, key=lambda fold: metric.cost(fold["after"]))["task"] if known else None
    means = scores.mean(axis=0).tolist() if known else [None, None]
    width = float(half_width(scores[:, 1:])[0]) if len(known) > 1 else None
    return row | {
        "failed": len(row["folds"]) - len(known),
        "before": means[0],
        "after": means[1],
        "ci95": width,
        "worst": worst,
    }


def _behind(row: Figures, best: Figures, metric: Metric) -> Figures | None:
    """By how much a row is worse than the best, over the tasks of both: mean and 95 % half-width; None: it is the best."""
    pairs = zip(row["folds"], best["folds"], strict=True)
    worse = [
        _lead(other["after"], mine["after"], metric) for mine, other in pairs if not (mine["failures"] or other["failures"])
    ]
    if row is best or not worse:
        return None
    values = np.array(worse)
    width = float(half_width(values)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "ci95": width, "tasks": len(values)}


def _lead(better: float, worse: float, metric: Metric) -> float:
    return better - worse if metric.higher_is_better else worse - better


# ---- the table


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of cells), the same for the terminal and Markdown."""
    metric = named(result["metric"])
    headings = ["algorithm", "before", "after", "worse than the first by", "worst task", "failed"]
    rows = []
    for row in result["algorithms"]:
        behind = row["behind"]
        worst = next((fold for fold in row["folds"] if fold["task"] == row["worst"]), None)
        cells = [row["algorithm"], _number(metric, row["before"]), _number(metric, row["after"], row["ci95"])]
        cells.append("-" if behind is None else _number(metric, behind["mean"], behind["ci95"]))
        cells.append("-" if worst is None else f"{worst['task']}: {_number(metric, worst['after'])}")
        rows.append([*cells, f"{row['failed']} of {len(row['folds'])}" if row["failed"] else "-"])
    return headings, rows


def _number(metric: Metric, value: float | None, width: float | None = None) -> str:
    return "-" if value is None else metric.number(value) + ("" if width is None else f" ± {metric.number(width)}")


def caption(result: Mapping[str, Any]) -> list[str]:
    """What one has to know to read the table, and what it says, in sentences."""
    metric, seeds = named(result["metric"]), result["seeds"]
    what = metric.heading if metric.higher_is_better else f"{metric.heading} (lower is better)"
    over = f", each the mean of {len(seeds)} seeds" if len(seeds) > 1 else ""
    lines = [
        f"{result['data']}: {what} on {counted(len(result['tasks']), 'task')}, each left out once{over}; mean ± half of the "
        "95 % interval over tasks. Differences are taken task by task; rates are chosen on validation tasks of each fold."
    ]
    alike = [row["algorithm"] for row in result["algorithms"] if (behind := row["behind"]) and not _is_clear(behind)]
    if alike:
        lines.append(f"Not told apart from {result['algorithms'][0]['algorithm']} by these tasks: {', '.join(alike)}.")
    return lines


def _is_clear(behind: Mapping[str, Any]) -> bool:
    """Whether the interval of a difference leaves out zero."""
    return behind["ci95"] is not None and behind["mean"] > behind["ci95"]


def failures(result: Mapping[str, Any]) -> list[str]:
    """A sentence for every fold without a score."""
    rows = ((row["algorithm"], fold) for row in result["algorithms"] for fold in row["folds"])
    return [f"{name} without {fold['task']}: {reason}" for name, fold in rows for reason in dict.fromkeys(fold["failures"])]


def rich_table(result: Mapping[str, Any]) -> Table:
    """The table for a terminal; the caption goes below it."""
    headings, rows = table(result)
    built = Table()
    for heading in headings:
        built.add_column(heading, justify="left" if heading in ("algorithm", "worst task") else "right")
    for cells in rows:
        built.add_row(*map(escape, cells))
    return built


def write(result: Mapping[str, Any], directory: Path) -> None:
    """leave-one-out.json, .md and .csv (a line for each algorithm and task), each whole or not at all."""
    writer = RunDirectory(directory)
    writer.write_json(f"{FILE}.json", result)
    headings, rows = table(result)
    lines = [
        f"| {' | '.join(headings)} |",
        "|---|" + "---:|" * (len(headings) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    lines += [
        "",
        *caption(result),
        *(f"- {line}" for line in failures(result)),
        "",
        "To repeat it:",
        "",
        f"    {result['command']}",
        "",
        *footing(result),
        "",
    ]
    writer.write_text(f"{FILE}.md", "\n".join(lines))
    names = ("algorithm", "task", "before", "after")
    scores = [{"algorithm": row["algorithm"], **fold} for row in result["algorithms"] for fold in row["folds"]]
    with whole(directory / f"{FILE}.csv", newline="") as file:
        write_csv(file, list(names), [{name: "" if one[name] is None else one[name] for name in names} for one in scores])
