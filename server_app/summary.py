"""The end of a run: choose the rate on the validation tasks, score test and training tasks once, write the results."""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO
from typing import Any

import flwr
import numpy as np
import torch
from flwr.serverapp import Grid

from quickbloom import __version__
from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.errors import RunError, as_told
from quickbloom.common.flower.names import log
from quickbloom.common.formatting import counted, data_name
from quickbloom.common.metric import LOSS, Metric, named, of_kind
from quickbloom.common.scores import names
from quickbloom.server_app.events.kinds import Ended, finite
from quickbloom.server_app.federation.asynchronous.turns import contributions
from quickbloom.server_app.federation.baselines import TaskScores
from quickbloom.server_app.federation.sampling import seen_users
from quickbloom.server_app.federation.scores import Scores, gains_at_the_end
from quickbloom.server_app.federation.strategy import MetaStrategy
from quickbloom.server_app.messaging.population import Population
from quickbloom.server_app.messaging.runtimes import runtime_of, workers_of
from quickbloom.server_app.reporting.against_baselines import against_baselines, rows_of
from quickbloom.server_app.reporting.result_table import result_lines
from quickbloom.server_app.runs import trackers
from quickbloom.server_app.runs.directory import RunDirectory, read_history, spread

_MOST_NAMED = 5


def clients_of(strategy: MetaStrategy, split: str, scores: Scores | None, lr: float, step: int) -> trackers.Clients:
    """Return every held-out task's score before and after adaptation."""
    if scores is None or not scores.task_ids:
        return {}
    name = strategy.evaluation.metric.name
    values = scores.metrics[:, scores.lrs.index(lr)]
    return {f"{split}/{name}_before": values[:, 0], f"{split}/{name}_after": values[:, step]}


def conclude(
    grid: Grid,
    strategy: MetaStrategy,
    directory: RunDirectory,
    seconds: Callable[[], dict[str, float]],
    resumed: int,
    live: trackers.Trackers,
) -> dict[str, Any]:
    """Choose the adaptation rate on the validation tasks, score the test tasks and the training tasks once, write the results.

    `seconds`: returns the duration of the run so far, "total" and "cpu". Returns the summary.
    Raises RunError.
    """
    validation = _validation_scores(strategy)
    lr, steps = strategy.chosen_rate()
    test = _test_scores(grid, strategy, lr)
    shots = _score_shots(grid, strategy, lr, steps)
    seen, could_be = _seen_scores(grid, strategy, lr)
    compared = strategy.config.baselines and (test.task_ids or seen)
    beside = strategy.score_baselines(grid, lr, steps, seen.task_ids if seen else ()) if compared else None
    kind = strategy.population.spec.kind
    strategy.let_keep(grid, strategy.meta, lr, steps, directory.path.name)
    history = read_history(directory.path)
    pace = float(np.median([record["seconds"] for record in history]))
    content = {
        **_facts(strategy),
        "run_dir": str(directory.path),
        "runtime": runtime_of(grid),
        "workers": workers_of(grid),
        "chosen": {"adapt_lr": lr, "adapt_steps": steps},
        "kept": _kept(strategy, validation, lr, steps),
        "edge": _edge(strategy, validation, lr, steps),
        "test": _describe(strategy, test, lr),
        "validation": _describe(strategy, validation, lr),
        "seen": _of_seen(strategy, seen, lr, could_be, beside),
        "shots": shots,
        "baselines": _beside_baselines(strategy, beside) if beside else None,
        "seconds": {**seconds(), "round_median": pace},
        "virtual_hours": history[-1].get("virtual_hours"),
        "async": _asynchronous(strategy, history),
        "resumed": resumed,
    }
    summary: dict[str, Any] = finite(content)
    population = strategy.population
    more = rows_of(beside, kind) if beside else {}
    metric = strategy.evaluation.metric
    rows = [
        row
        for split, scores in (("validation", validation), ("test", test), ("seen", seen))
        for row in _rows(population, split, scores, lr, metric)
    ]
    directory.write_per_task([{**row, **more.get(row["task"], {})} for row in rows])
    directory.write_json("summary.json", summary)
    live.end(summary, clients_of(strategy, "test", test, lr, steps))
    for line in result_lines(summary):
        log(INFO, "%s", line)
    strategy.events.tell(Ended(summary))
    return summary


def _edge(strategy: MetaStrategy, validation: Scores | None, lr: float, steps: int) -> str:
    """Return a sentence if the rate or the number of steps is at the end of what was tried: a better one may lie beyond."""
    if validation is None or not validation.task_ids or not ALGORITHMS[strategy.config.algorithm].uses_adapt_lr:
        return ""
    lrs, at = validation.lrs, validation.lrs.index(lr)
    said = []
    if len(lrs) > 1 and at in (0, len(lrs) - 1):
        said.append(f"the rate {lr:g} is the {'lowest' if at == 0 else 'highest'} that was tried (`adapt-lrs`)")
    if validation.steps > 1 and gains_at_the_end(validation, strategy.evaluation.metric, lr, steps):
        said.append(f"{steps} steps are the most that were tried (`adapt-steps`)")
    return f"adaptation may gain beyond what was tried: {' and '.join(said)}" if said else ""


def _asynchronous(strategy: MetaStrategy, history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what there is to say of steps and contributions in mode async; None in mode sync."""
    training = strategy.asynchronous
    if training is None:
        return None
    steps = sum("skipped" not in record for record in history)
    hours, seconds = history[-1].get("virtual_hours"), sum(record["seconds"] for record in history)
    return {
        # Where time is virtual, the clock of this machine says nothing of the devices.
        "steps_per_minute": _rate(steps, seconds / 60) if hours is None else None,
        "steps_per_virtual_hour": _rate(steps, hours),
        "staleness": {str(age): number for age, number in sorted(training.steps_by_staleness.items())},
        "dropped": training.dropped,
        "contributions": contributions(training.contributed, strategy.population.splits["train"]),
    }


def _rate(steps: int, time: float | None) -> float | None:
    return round(steps / time, 4) if time else None


def _kept(strategy: MetaStrategy, validation: Scores | None, lr: float, steps: int) -> dict[str, Any]:
    """Return the round whose model the run ends with, its validation score, and that of the model of the last round."""
    metric, number = strategy.evaluation.metric, strategy.evaluation.of_round
    known = validation is not None and bool(validation.task_ids)
    score = float(validation.metrics[:, validation.lrs.index(lr), steps].mean()) if validation and known else None
    return {"round": number, metric.name: score, "last": score if number == strategy.config.rounds else strategy.last_score}


def _beside_baselines(strategy: MetaStrategy, found: TaskScores) -> dict[str, Any] | None:
    """Return the comparison with the baselines on the test tasks, and as "validation" the same on the validation tasks."""
    splits, kind, metric = strategy.population.splits, strategy.population.spec.kind, strategy.evaluation.metric
    tested, validated = (against_baselines(found.of(splits[split]), names(kind), metric) for split in ("test", "validation"))
    return {**tested, "validation": validated} if tested else None


def _validation_scores(strategy: MetaStrategy) -> Scores | None:
    """Return the last scores of the validation tasks; None if none was asked for."""
    evaluation, scores = strategy.evaluation, strategy.evaluation.last
    if strategy.population.splits["validation"] and (scores is None or not scores.task_ids):
        strategy.events.warn(f"No validation task could be scored: the inner rate and all {evaluation.steps} steps are used")
    return scores


def _test_scores(grid: Grid, strategy: MetaStrategy, lr: float) -> Scores:
    tasks = strategy.population.splits["test"] if strategy.config.scores_unseen else []
    scores = strategy.score_tasks(grid, strategy.meta, tasks, [lr])
    _tell_without(strategy, scores)
    if tasks and not scores.task_ids:
        raise RunError("no node sent a usable score of the test tasks: the log above names the reasons")
    return scores


def _tell_without(strategy: MetaStrategy, scores: Scores) -> None:
    """Warn of tasks that have no such score; raises RunError if no other is left."""
    if without := strategy.evaluation.without:
        some = ", ".join(as_told(task, 60) for task in without[:_MOST_NAMED])
        said = f"the test rows of {counted(len(without), 'task')} ({some}) are of one class, which has no"
        said += f" {strategy.evaluation.metric.title}"
        if not scores.task_ids:
            raise RunError(f"{said}: choose another `metric`, such as accuracy or log_loss")
        strategy.events.warn(f"{said}: scores are of the other tasks")


def _seen_scores(grid: Grid, strategy: MetaStrategy, lr: float) -> tuple[Scores | None, int]:
    """Return (scores of the training tasks as seen users, how many tasks could be scored); None without any."""
    config = strategy.config
    tasks, could_be = seen_users(config, strategy.population)
    if not tasks:
        return None, could_be
    scores = strategy.score_seen(grid, tasks, lr)
    if config.scores_unseen and not scores.task_ids:
        strategy.events.warn("No training task could be scored as a seen user: the log above names the reasons")
        return None, could_be
    _tell_without(strategy, scores)
    if not scores.task_ids:
        raise RunError("no node sent a usable score of its training tasks: the log above names the reasons")
    return scores, could_be


def _of_seen(
    strategy: MetaStrategy, scores: Scores | None, lr: float, could_be: int, beside: TaskScores | None
) -> dict[str, Any] | None:
    """Return what `_describe` does, with how many training tasks were scored, of how many that could be, and baselines."""
    described = _describe(strategy, scores, lr)
    if scores is None or described is None:
        return None
    kind, metric = strategy.population.spec.kind, strategy.evaluation.metric
    baselines = against_baselines(beside.of(scores.task_ids), names(kind), metric) if beside else None
    return {"tasks": len(scores.task_ids), "of": could_be, **described, "baselines": baselines}


def _facts(strategy: MetaStrategy) -> dict[str, Any]:
    """Return the content of the summary except for the result."""
    config = strategy.config
    return {
        "schema": 1,
        "algorithm": config.algorithm,
        "dataset": config.dataset,
        "data": data_name(config.flat()),
        "seed": config.seed,
        "rounds": config.rounds,
        "tasks": {name: len(ids) for name, ids in strategy.population.splits.items()},
        "best_validation": strategy.evaluation.best,
        "bytes": strategy.bytes,
        "privacy": strategy.privacy.record() if strategy.privacy else None,
        "failures": strategy.failures,
        "joined": {"nodes": strategy.joining.count, "tasks": len(strategy.population.joined)},
        "late": strategy.late + strategy.nodes.late.total(),
        "versions": {
            "quickbloom": __version__,
            "flwr": flwr.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _describe(strategy: MetaStrategy, scores: Scores | None, lr: float) -> dict[str, Any] | None:
    """Return mean, spread and worst tenth at every step; None if no task was scored."""
    if scores is None or not scores.task_ids:
        return None
    at = scores.lrs.index(lr)
    metric = strategy.evaluation.metric
    other = _second(metric)
    sizes = [strategy.population.tasks[task_id].num_test for task_id in scores.task_ids]
    second = {} if scores.second is None else {other.name: spread(scores.second[:, at], other, sizes)}
    return {
        "steps": list(range(scores.metrics.shape[2])),
        metric.name: spread(scores.metrics[:, at], metric, sizes),
        "loss": spread(scores.losses[:, at], LOSS, sizes),
        **second,
    }


def _score_shots(grid: Grid, strategy: MetaStrategy, lr: float, steps: int) -> dict[str, Any] | None:
    """Score the test tasks adapted on few examples, at the chosen step; None if `test-shots` has no usable number.

    A number above `_most_shots` would score all examples: it is left out.
    """
    spec, test = strategy.population.spec, strategy.population.splits["test"]
    support = max((strategy.population.tasks[task_id].num_support for task_id in test), default=0)
    most = _most_shots(support, spec.outputs if spec.kind == "classification" else 1)
    scored: dict[int, Scores] = {}
    for shots in strategy.config.shots:
        if shots <= most:
            scores = strategy.score_tasks(grid, strategy.meta, test, [lr], shots)
            scored |= {shots: scores} if scores.task_ids else {}
    if not scored:
        return None

    def columns(values: Iterable[np.ndarray[Any, Any]], metric: Metric) -> dict[str, list[float]]:
        sizes = [[strategy.population.tasks[one].num_test for one in scores.task_ids] for scores in scored.values()]
        spreads = [spread(value[:, 0, [steps]], metric, of) for value, of in zip(values, sizes, strict=True)]
        return {part: [one[part][0] for one in spreads] for part in spreads[0]}

    metric = strategy.evaluation.metric
    return {
        "shots": list(scored),
        metric.name: columns((scores.metrics for scores in scored.values()), metric),
        "loss": columns((scores.losses for scores in scored.values()), LOSS),
    }


def _most_shots(support: int, classes: int) -> int:
    """Return the largest number of examples per class worth a score, for tasks with at most so many support examples.

    The server does not know how these are spread over the classes. They are assumed to be even,
    unless there are more classes than examples, as with characters of text; then all may be of one
    class. (10, 5) -> 2; (20, 76) -> 20.
    """
    return support // classes if support >= classes else support


def _second(metric: Metric) -> Metric:
    """Return what nodes of a user's own data measure beside `metric`."""
    return named(metric.second or of_kind(str(metric.kind)).name)


def _rows(population: Population, split: str, scores: Scores | None, lr: float, metric: Metric) -> list[dict[str, Any]]:
    if scores is None:
        return []
    at = scores.lrs.index(lr)
    rows = []
    for i, task_id in enumerate(scores.task_ids):
        info = population.tasks[task_id]
        adapts_on = info.num_support + (info.num_query if split == "seen" else 0)
        row: dict[str, Any] = {"task": task_id, "split": split, "num_support": adapts_on, "num_test": info.num_test}
        row |= {f"{metric.name}_step{step}": value for step, value in enumerate(scores.metrics[i, at].tolist())}
        row |= {f"loss_step{step}": value for step, value in enumerate(scores.losses[i, at].tolist())}
        if scores.second is not None:
            row |= {f"{_second(metric).name}_step{step}": value for step, value in enumerate(scores.second[i, at].tolist())}
        rows.append(row)
    return rows
