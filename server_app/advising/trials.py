"""Runs the candidates on one split of the users, with more rounds for those that did well: successive halving.

Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization": all candidates get a few
rounds, the better half more. They are ranked on validation users; the test users are scored for the report alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.baselines.scoring import BASELINES
from quickbloom.common.config.run import RunConfig, Scalar, parse_run_config
from quickbloom.common.errors import QuickbloomError, RunError
from quickbloom.common.formatting import counted
from quickbloom.common.metric import Metric, named
from quickbloom.common.spreadsheets import read_csv
from quickbloom.server_app.advising.candidates import Candidate
from quickbloom.server_app.launch.follow import run_here
from quickbloom.server_app.launch.prepare import check_locally

Say = Callable[[str], None]

FEW_USERS = 10
"""With fewer tasks every task is held out once, since a split would leave one or two to choose by."""
SHOTS = "1,2,5,10,20,50"


@dataclass(frozen=True)
class Trial:
    """A candidate after `rounds` rounds. `runs`: summaries, one for each split; `scores`: by part and contender, by task.

    The parts are "choosing" and "telling": the tasks that decide, and those that the advice is told of. With few users they
    are the same. A contender that diverged for a task has NaN there.
    """

    candidate: Candidate
    rounds: int
    runs: Sequence[dict[str, Any]]
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]

    @property
    def metric(self) -> Metric:
        return named(self.runs[0]["baselines"]["metric"])

    def mean(self, part: str, contender: str = "after") -> float:
        """Return the mean score of a contender over the tasks of a part; NaN if it diverged for one or is not known."""
        values = list(self.scores[part].get(contender, {}).values())
        return float(np.mean(values)) if values else math.nan


def halve(
    settings: Mapping[str, Scalar], candidates: Sequence[Candidate], tasks: Sequence[str], folder: Path, say: Say
) -> list[Trial]:
    """Return the last trial of every candidate, the best on the choosing tasks first.

    A candidate that fails is left out. Raises RunError if all fail, or what is wrong with the settings or the data.
    """
    rounds = int(settings.get("rounds", RunConfig().rounds))
    steps = sorted({max(1, rounds // 4), rounds})
    left = list(candidates)
    dropped: list[Trial] = []
    for stage, number in enumerate(steps):
        trials = _ordered(_all_tried(settings, left, number, tasks, folder, say))
        if stage < len(steps) - 1:
            kept = max(2, math.ceil(len(trials) / 2))
            dropped = trials[kept:]
            left = [trial.candidate for trial in trials[:kept]]
    return _ordered([*trials, *dropped])


def _all_tried(
    settings: Mapping[str, Scalar], candidates: Iterable[Candidate], rounds: int, tasks: Sequence[str], folder: Path, say: Say
) -> list[Trial]:
    trials: list[Trial] = []
    failed: dict[str, QuickbloomError] = {}
    for candidate in candidates:
        say(f"{candidate.name}: {counted(rounds, 'round')}")
        try:
            trials.append(
                _tried(settings, candidate, rounds, tasks, folder / f"{rounds}-{candidate.algorithm}-{candidate.model}")
            )
        except QuickbloomError as error:
            failed[candidate.name] = error
    for reason in failed.values():
        # What stops all of them is a mistake in the settings or the data, and no matter of candidates.
        if not trials and not isinstance(reason, RunError):
            raise reason
    for name, reason in failed.items():
        say(f"{name} is left out: {reason}")
    if not trials:
        raise RunError("every candidate failed: the lines above say why")
    return trials


def _ordered(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials, the best on the choosing tasks first.

    A task that one contender was scored on counts for all: else the mean of one that diverged there would be over the others.
    """
    tasks = {
        part: sorted({task for trial in trials for scores in trial.scores[part].values() for task in scores})
        for part in ("choosing", "telling")
    }
    filled = [
        replace(trial, scores={part: _filled(trial.scores[part], known) for part, known in tasks.items()}) for trial in trials
    ]
    return sorted(filled, key=lambda one: one.metric.cost(one.mean("choosing")))


def _filled(by_contender: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    names = ("after", *(name for name in by_contender if name != "after"))
    return {name: {task: by_contender.get(name, {}).get(task, math.nan) for task in tasks} for name in names}


def _tried(settings: Mapping[str, Scalar], candidate: Candidate, rounds: int, tasks: Sequence[str], folder: Path) -> Trial:
    shared = {"min-nodes": 1, "checkpoint-every": 0, "evaluate-every": 0, **settings, **candidate.settings, "rounds": rounds}
    shared |= {"baselines": True, "test-shots": SHOTS, "evaluate-users": "unseen"}
    few = len(tasks) < FEW_USERS
    runs = []
    for number, task in enumerate(tasks if few else [""]):
        # With two tasks one alone must train; and where there is no rate to choose, all others should.
        chooses = len(tasks) > 2 and ALGORITHMS[candidate.algorithm].uses_adapt_lr
        validation: dict[str, Scalar] = {} if chooses or not few else {"validation-tasks": 0}
        split: dict[str, Scalar] = {"own.leave-out": task} if few else {"validation-tasks": 0.3, "test-tasks": 0.3}
        own = {**shared, **validation, **split, "output-dir": str((folder / str(number)).absolute())}
        check_locally(parse_run_config(own), own, 1)
        runs.append(run_here(parse_run_config(own), 1, rounds=False, shown=False, warned=_EVERYTHING))
        if not runs[-1]["baselines"]:
            raise RunError("no held-out user could be scored")
    metric = str(runs[0]["baselines"]["metric"])
    told = _read(runs, "test", metric)
    return Trial(candidate, rounds, runs, {"telling": told, "choosing": told if few else _read(runs, "validation", metric)})


class _Everything(set[str]):
    """Contains every warning, so that none is printed once more for every candidate."""

    def __contains__(self, _: object) -> bool:
        return True


_EVERYTHING = _Everything()


def _read(runs: Iterable[dict[str, Any]], split: str, metric: str) -> dict[str, dict[str, float]]:
    """Return the scores by contender and task that the runs wrote into their per_task.csv."""
    found: dict[str, dict[str, float]] = {}
    for run in runs:
        with (Path(run["run_dir"]) / "per_task.csv").open(newline="", encoding="utf-8") as file:
            for row in read_csv(file):
                if row["split"] != split:
                    continue
                for contender in ("after", *BASELINES):
                    cell = row.get(f"{metric}_{contender}", "")
                    if cell not in ("", "nan"):
                        found.setdefault(contender, {})[row["task"]] = float(cell)
    return found
