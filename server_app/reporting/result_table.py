"""The result of a run for a person: a table for a terminal, lines for a log."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.baselines.scoring import CONTENDERS
from quickbloom.common.errors import as_told
from quickbloom.common.formatting import counted, duration, size
from quickbloom.common.metric import Metric, metric_of, named, shown
from quickbloom.common.spreadsheets import read_csv
from quickbloom.server_app.reporting.against_baselines import title_of, verdict

ONE_TASK = "no interval: the spread over tasks cannot be told from a single one"
_FEW_TASKS = 3
_SCORES_SHOWN = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced",
    "auroc": "AUROC",
    "log_loss": "log loss",
    "brier": "Brier",
    "rmse": "rmse",
    "mae": "mae",
    "r2": "R2",
    "coverage_90": "90 % holds",
}
"""Scores in the table of baselines, with their headings; summary.json and the report have all of them."""


def result_table(summary: dict[str, Any]) -> Table:
    """Before and after adaptation on held-out tasks: mean with its 95 % half-width, and the worst tenth of the tasks."""
    chosen, seconds, sent = summary["chosen"], summary["seconds"], summary["bytes"]
    chosen_on = "chosen on validation tasks" if summary["validation"] else "no validation tasks to choose on"
    notes = [
        f"adapted with {_rate(summary)}{counted(chosen['adapt_steps'], 'step')} ({chosen_on})",
        kept_line(summary),
        summary.get("edge", ""),
        f"{duration(seconds['total'])} in all{_where(summary)}, {seconds['round_median']:.2f} s a round",
        f"{size(sent['up'])} up, {size(sent['down'])} down; {counted(summary['failures'], 'failure')}",
        privacy_line(summary["privacy"]) if summary.get("privacy") else "",
        f"of one task {ONE_TASK}" if _one_task(summary) else "",
        _own_unit(summary),
    ]
    table = Table(
        title=escape(
            f"{summary['algorithm']} on {summary.get('data', summary['dataset'])}, {summary['rounds']} rounds, "
            f"seed {summary['seed']}"
        ),
        caption="\n".join(filter(None, notes)),
    )
    held_out = [split for split in ("validation", "test") if summary[split]]
    users = "seen users" if summary.get("seen") and not held_out else "held-out tasks"
    for heading in (users, "", "before", "after", "worst 10 % after"):
        table.add_column(heading, justify="left" if heading in (users, "") else "right")
    for split in held_out or ["seen"]:
        scores = summary.get(split) or {}
        number = summary["tasks"][split] if held_out else scores.get("tasks")
        for metric in shown(scores) if scores else []:
            table.add_row(f"{split} ({number})", metric.title, *_cells(scores, metric, chosen["adapt_steps"]))
    return table


def baseline_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The mean scores by the trained model and by every baseline, with one sentence: of test tasks, and of seen users."""
    known = {"test task": summary.get("baselines"), "seen user": (summary.get("seen") or {}).get("baselines")}
    return [_baseline_table(content, who) for who, content in known.items() if content]


def _baseline_table(content: Mapping[str, Any], who: str) -> Table:
    columns = [named(name) for name in _SCORES_SHOWN if name in content["scores"]]
    table = Table(title=f"the same {counted(content['tasks'], who)} by baselines", caption=escape(verdict(dict(content))))
    table.add_column("", justify="left", no_wrap=True)
    for metric in columns:
        table.add_column(_SCORES_SHOWN[metric.name], justify="right")
    for contender in CONTENDERS:
        cells = [content["scores"][metric.name].get(contender) for metric in columns]
        if any(cells):
            table.add_row(title_of(contender, columns[0]), *map(_short, columns, cells))
    return table


def users_table(summary: Mapping[str, Any]) -> Table | None:
    """Unseen and seen users side by side, with one note; None if no training task was scored."""
    rows = users_rows(summary)
    if not rows:
        return None
    table = Table(title=f"unseen and seen users: {metric_of(summary['seen']).heading}", caption=USERS_NOTE)
    for heading in USERS_HEADINGS:
        table.add_column(heading, justify="right" if heading else "left")
    for cells in rows:
        table.add_row(*cells)
    return table


USERS_HEADINGS = ("", "before", "after", "by examples", "worst 10 %", "spread")
USERS_NOTE = (
    "seen: training tasks, on test examples of their own, from what they keep on their nodes; by examples: each example "
    "counts alike; spread: standard deviation over users"
)


def users_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The cells of a table of both protocols, by the score that decides; [] if no training task was scored."""
    seen, step = summary.get("seen"), summary["chosen"]["adapt_steps"]
    if not seen:
        return []
    metric, rows = metric_of(seen), []
    numbers = {"unseen": summary["tasks"]["test"], "seen": seen["tasks"]}
    for name, scores in (("unseen", summary["test"]), ("seen", seen)):
        if scores is not None and metric.name in scores:
            parts = scores[metric.name]
            before, after = (metric.number(parts["mean"][k], parts["ci95"][k]) for k in (0, step))
            others = (metric.number(parts[part][step]) for part in ("weighted", "worst10"))
            of = f" of {seen['of']}" if name == "seen" and seen["of"] > seen["tasks"] else ""
            rows.append([f"{name} ({numbers[name]}{of})", before, after, *others, _spread(parts["sd"][step], metric)])
    return rows


def _spread(value: float | None, metric: Metric) -> str:
    return "-" if value is None or not math.isfinite(value) else metric.number(value)


def _rate(summary: dict[str, Any]) -> str:
    algorithm = ALGORITHMS.get(summary["algorithm"])
    return "" if algorithm is not None and not algorithm.uses_adapt_lr else f"rate {summary['chosen']['adapt_lr']:g}, "


def _short(metric: Metric, cell: dict[str, Any] | None) -> str:
    if not cell:
        return ""
    return metric.score(cell["mean"]) if metric.share else f"{cell['mean']:.3g}"


def few_tasks(summary: dict[str, Any], *, own_file: bool) -> list[str]:
    """Of a few test tasks their names, if per_task.csv is on this machine, and what else can be done with so few.

    `own_file`: the data are one file, on this machine.
    """
    number = summary["tasks"]["test"]
    if not 0 < number <= _FEW_TASKS:
        return []
    said = [f"Only {counted(number, 'test task')}{_named(Path(str(summary['run_dir'])))}: others may fare otherwise."]
    if own_file:
        said.append("`quickbloom run --leave-one-out` tests every task on a model of the others.")
    return [" ".join(said)]


def _named(run_dir: Path) -> str:
    try:
        with (run_dir / "per_task.csv").open(newline="", encoding="utf-8") as file:
            names = [as_told(row["task"], 60) for row in read_csv(file) if row["split"] == "test"]
    except (OSError, KeyError, ValueError, csv.Error):  # names come from nodes
        return ""
    return f" ({', '.join(names)})"


_PLACES = {"simulation": " in Flower's simulation", "deployment": " on a SuperLink's nodes"}


def _where(summary: Mapping[str, Any]) -> str:
    """Return where the nodes ran, in words; "" if an older release wrote the summary."""
    workers = summary.get("workers") or 1
    here = " in one process" if workers == 1 else f" in {workers} worker processes"
    return here if summary.get("runtime") == "in-process" else _PLACES.get(str(summary.get("runtime")), "")


def result_lines(summary: dict[str, Any]) -> list[str]:
    """The same result as plain lines, for a log."""
    lines = []
    for split in ("validation", "test"):
        if (scores := summary[split]) is None:
            continue
        metric = metric_of(scores)
        before, after, worst = _cells(scores, metric, summary["chosen"]["adapt_steps"])
        tasks = summary["tasks"][split]
        lines.append(
            f"{counted(tasks, f'{split} task')}: {metric.title} {before} before, {after} after "
            f"{counted(summary['chosen']['adapt_steps'], 'step')}, worst 10 % {worst}"
        )
    if seen := summary.get("seen"):
        metric, step = metric_of(seen), summary["chosen"]["adapt_steps"]
        before, after, worst = _cells(seen, metric, step)
        lines.append(
            f"{counted(seen['tasks'], 'seen user')} (training tasks, on test examples of their own): {metric.title} {before} "
            f"before, {after} after {counted(step, 'step')}, worst 10 % {worst}"
        )
    of_seen = verdict((summary.get("seen") or {}).get("baselines"))
    lines += filter(None, (kept_line(summary), verdict(summary.get("baselines")), of_seen and f"on seen users {of_seen}"))
    if privacy := summary.get("privacy"):
        lines.append(privacy_line(privacy))
    return lines


def kept_line(summary: Mapping[str, Any]) -> str:
    """Which model the run ended with, "" if it is that of the last round."""
    kept = summary.get("kept")
    if not kept or kept["round"] == summary["rounds"] or not summary["validation"]:
        return ""
    metric = metric_of(summary["validation"])
    scores = f"validation {metric.title} {metric.score(kept[metric.name])}, {metric.score(kept['last'])} after the last round"
    if not kept["round"]:
        return f"the initial model is kept, training did not help: {scores}"
    return f"the model of round {kept['round']} is kept: {scores}"


def own_unit(metric: Metric, dataset: str) -> str:
    """What a score is measured in, "" where the number says it all."""
    return metric.own_unit if dataset == "own" else ""


def _own_unit(summary: dict[str, Any]) -> str:
    scores = summary["test"] or summary["validation"]
    return own_unit(metric_of(scores), summary["dataset"]) if scores else ""


def _one_task(summary: dict[str, Any]) -> bool:
    return any(summary[split] and summary["tasks"][split] == 1 for split in ("validation", "test"))


def privacy_line(privacy: dict[str, Any]) -> str:
    """What the noise is worth, in words."""
    epsilon, steps = privacy["epsilon"], counted(privacy["steps"], "step")
    found = "unbounded" if epsilon is None else f"{epsilon:.4g}"
    return f"differential privacy of a training task: epsilon {found}, delta {privacy['delta']:g}, after {steps}"


def _cells(scores: dict[str, Any], metric: Metric, step: int) -> tuple[str, str, str]:
    mean, half, worst = (scores[metric.name][part] for part in ("mean", "ci95", "worst10"))
    return metric.score(mean[0], half[0]), metric.score(mean[step], half[step]), metric.score(worst[step])
