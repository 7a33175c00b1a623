"""Few tasks: every task is held out once, and adapted from a model that was trained on the others. One table over all folds.

A fold is a run of its own with `own.leave-out`; its rate is chosen on validation tasks among the others, where there are any.
Repeated in the same directory with the same settings and data, the folds that are finished are kept.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from rich.markup import escape
from rich.table import Table

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.baselines.scoring import BASELINES, CONTENDERS
from quickbloom.common.config.key_value import assignment
from quickbloom.common.config.run import RunConfig, Scalar, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.base import resolve_data_dir
from quickbloom.common.datasets.own import Own
from quickbloom.common.errors import ConfigError
from quickbloom.common.metric import RMSE, Metric, chosen_for, metric_of, named
from quickbloom.common.spreadsheets import write_csv
from quickbloom.common.system.terminal import OK, STOPPED, say
from quickbloom.common.system.whole_files import whole
from quickbloom.server_app.comparing.batch import Run, Setup
from quickbloom.server_app.comparing.searching import locked
from quickbloom.server_app.federation.baselines import TaskScores
from quickbloom.server_app.launch.follow import follow_here
from quickbloom.server_app.launch.prepare import check_locally, scored_one_by_one
from quickbloom.server_app.reporting.against_baselines import against_baselines, title_of, verdict
from quickbloom.server_app.runs.directory import RunDirectory, spread

FILE = "leave-one-out"
_BEGUN = "folds.json"
"""Which folds were begun here, and with what: nothing else is removed."""


def run_all(settings: Mapping[str, Scalar], directory: Path, verbose: bool) -> tuple[int, dict[str, Any] | None]:
    """All folds, one after the other in this process: (exit code, `result`), the latter also in files; None if one failed.

    Folds that are finished in `directory` are kept. Raises ConfigError if it holds folds of other settings or data.
    """
    settings = {"min-nodes": 1, **settings}
    tasks = tasks_of(parse_run_config(settings))
    # Folds with other classes left out must not be scored by other metrics.
    settings = {**settings, "metric": metric_for_all(parse_run_config(settings))}
    number = len(tasks)
    tasks, unscored = scored_one_by_one(own_of(parse_run_config(settings)), tasks, str(settings["metric"]))
    if unscored:
        say(f"Remark: {unscored}")
    with locked(directory):
        begun = _begun(settings, directory)
        summaries: list[dict[str, Any]] = []
        warned: set[str] = set()
        for task in tasks:
            own = fold(settings, task, number, directory)
            kept = _finished(Path(str(own["output-dir"]))) if task in begun["folds"] else None
            code, summary = OK, kept
            if kept is None:
                for remark in check_locally(parse_run_config(own), own, 1):
                    if not summaries:
                        say(f"Remark: {remark}")
                begun["folds"] = [*begun["folds"], task]
                RunDirectory(directory).write_json(_BEGUN, begun)
                code, summary = follow_here(parse_run_config(own), 1, verbose, rounds=False, warned=warned)
            if summary is None:
                if code == STOPPED:
                    say(f"To go on, repeat the command with `--output {directory}`: it keeps what is finished.")
                return code, None
            summaries.append(summary)
            (row,) = rows([task], [summary])
            metric = metric_of(summary["test"])
            change = f"{metric.title} {metric.change(*_scores(row, metric), '->')}"
            say(f"{len(summaries)}/{len(tasks)} {task} left out: {change}{', kept' if kept else ''}")
        found = result(rows(tasks, summaries), metric_of(summaries[0]["test"]))
        write(directory, found)
    return OK, found


def _begun(settings: Mapping[str, Scalar], directory: Path) -> dict[str, Any]:
    """What was begun in the directory: "key", which names all that decides the folds, and "folds", the tasks.

    Raises ConfigError if the folds there are of other settings or data.
    """
    config = parse_run_config(settings)
    elsewhere = ("algorithm", "dataset", "rounds", "seed")
    texts = tuple(assignment(key, value) for key, value in sorted(settings.items()) if key not in elsewhere)
    # Named as a run of a comparison is: by its settings, the data, a user's own code, and the release.
    key = Run(Setup(config.algorithm, config.dataset, config.rounds, texts, 1, True), config.seed, directory).directory.name
    file = directory / _BEGUN
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"key": key, "folds": []}
    if found["key"] != key:
        raise ConfigError(
            f"`--output` '{directory}' holds folds of other settings or data: give these again, or choose another directory"
        )
    return found


def _finished(directory: Path) -> dict[str, Any] | None:
    """The summary of a fold that was finished; one that was begun and is not finished is removed."""
    file = directory / "summary.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    shutil.rmtree(directory, ignore_errors=True)
    return None


def metric_for_all(config: RunConfig) -> str:
    """The name of what all folds are scored by: that of the settings, or the one for the rows of all tasks."""
    if config.metric != "auto":
        return config.metric
    own = own_of(config)
    if own.kind == "regression":
        return RMSE.name  # each fold standardises by its own rows, so their mean squared errors have no common unit
    return chosen_for(own.kind, own.class_counts([task.task_id for task in own.tasks()])).name


def own_of(config: RunConfig) -> Own:
    """The data of the settings, which `tasks_of` has seen to be a user's own."""
    own = load_dataset("own", config.table("own"), resolve_data_dir(config.data_dir))
    assert isinstance(own, Own)
    return own


def tasks_of(config: RunConfig) -> list[str]:
    """The tasks to leave out, one after the other. Raises ConfigError if there is nothing to leave out."""
    if config.dataset != "own":
        raise ConfigError(f'`--leave-one-out` is for data of your own (`--data`), got `dataset = "{config.dataset}"`')
    if not config.scores_unseen:
        raise ConfigError('`evaluate-users` must not be "seen" with `--leave-one-out`, which scores the task that is left out')
    tasks = own_of(config).tasks()
    if len(tasks) < 2:
        raise ConfigError(
            f"`--leave-one-out` needs at least two tasks, the data have {len(tasks)}: name the column that tells them "
            "apart with `--task`"
        )
    return [task.task_id for task in tasks]


def fold(settings: Mapping[str, Scalar], task: str, number: int, directory: Path) -> dict[str, Scalar]:
    """The settings of the run that leaves `task` out of `number` tasks."""
    # One other task alone must train; and where there is no rate to choose, all others should.
    algorithm = ALGORITHMS.get(str(settings.get("algorithm", RunConfig().algorithm)))
    chooses = number > 2 and (algorithm is None or algorithm.uses_adapt_lr)
    validation: dict[str, Scalar] = {} if chooses else {"validation-tasks": 0}
    where = str((directory / quote(task, safe="").replace(".", "%2E")).absolute())
    return {**validation, "evaluate-users": "unseen", **settings, "own.leave-out": task, "output-dir": where}


def rows(tasks: Sequence[str], summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task: its score before and after adaptation, at the rate and step that its fold chose."""
    listed = []
    for task, summary in zip(tasks, summaries, strict=True):
        name = metric_of(summary["test"]).name
        curve, chosen = summary["test"][name]["mean"], summary["chosen"]
        scores = {f"{name}_before": curve[0], f"{name}_after": curve[chosen["adapt_steps"]]}
        beside = (summary.get("baselines") or {}).get("scores", {}).get(name, {})
        scores |= {f"{name}_{one}": beside[one]["mean"] for one in BASELINES if one in beside}
        others = {"train": summary["tasks"]["train"], "validation": summary["tasks"]["validation"]}
        listed.append({"task": task, **others, **scores, **chosen, "run_dir": summary["run_dir"]})
    return listed


def _scores(row: Mapping[str, Any], metric: Metric) -> tuple[float | None, float | None]:
    """Before and after adaptation. A fold that diverged is null in its summary."""
    return row[f"{metric.name}_before"], row[f"{metric.name}_after"]


def result(folds: Sequence[Mapping[str, Any]], metric: Metric) -> dict[str, Any]:
    """What `--json` prints: the folds, and mean, 95 % half-width and worst tenth over them, before and after."""
    # NumPy makes NaN of None.
    over = spread(np.array([_scores(row, metric) for row in folds], dtype=np.float64), metric)
    return {
        "schema": 1,
        "metric": metric.name,
        "folds": list(folds),
        **{part: over[part] for part in ("mean", "ci95", "worst10")},
        "baselines": _baselines(folds, metric),
    }


def _baselines(folds: Sequence[Mapping[str, Any]], metric: Metric) -> dict[str, Any] | None:
    """As in summary.json of a run, over the folds, with the scores by `metric` alone."""
    names = [f"{metric.name}_{one}" for one in CONTENDERS]
    values = np.array([[_nan(row.get(name)) for name in names] for row in folds])
    tasks = TaskScores([str(row["task"]) for row in folds], values[:, :, None])
    return against_baselines(tasks, [metric.name], metric)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def write(directory: Path, found: Mapping[str, Any]) -> None:
    """leave-one-out.json and leave-one-out.csv, each whole or not at all."""
    run = RunDirectory(directory)
    run.write_json(f"{FILE}.json", found)
    with whole(directory / f"{FILE}.csv", newline="") as file:
        write_csv(file, list(dict.fromkeys(name for row in found["folds"] for name in row)), found["folds"])


def table(found: Mapping[str, Any]) -> Table:
    """The same for a person."""
    metric = named(found["metric"])
    shown = Table(title=f"{len(found['folds'])} tasks, each held out once: {metric.heading}")
    for heading in ("held-out task", "trained on", "before", "after", "rate", "steps"):
        shown.add_column(heading, justify="left" if heading == "held-out task" else "right")
    for row in found["folds"]:
        cells = map(metric.number, _scores(row, metric))
        shown.add_row(escape(row["task"]), str(row["train"]), *cells, f"{row['adapt_lr']:g}", str(row["adapt_steps"]))
    shown.add_section()
    means = [f"{metric.number(found['mean'][i])} ± {metric.number(found['ci95'][i])}" for i in (0, 1)]
    shown.add_row("mean", "", *means, "", "")
    beside = (found.get("baselines") or {}).get("scores", {}).get(metric.name, {})
    for one in BASELINES:
        if one in beside:
            shown.add_row(title_of(one, metric), "", "", metric.number(beside[one]["mean"], beside[one]["ci95"]), "", "")
    shown.caption = escape(verdict(found.get("baselines")))
    return shown
