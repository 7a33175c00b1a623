"""The ServerApp: settings -> roll call -> rounds -> final test -> run directory."""

import os
import platform
import sys
import time
import uuid
from collections.abc import Iterable
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import flwr
import numpy as np
import torch
from flwr.app import Context
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from common import __version__
from common.assemble import build_algorithm
from common.config import RunConfig, parse_run_config
from common.errors import ConfigError, QuickbloomError
from common.params import mismatch
from common.wire import to_arrays
from server_app import checkpoint
from server_app.history import RunDirectory, read_history, spread, to_json
from server_app.live import SUMMARY, result_lines
from server_app.outer import OuterOptimizer
from server_app.polling import PollingGrid
from server_app.rollcall import Population, call_roll
from server_app.strategy import MetaStrategy, RunError, Scores

app = ServerApp()

# Settings that do not decide what is learned, so that a run may go on with others.
_MAY_CHANGE = {
    *("output-dir", "resume-from", "data-dir", "device", "chunk-size", "min-nodes", "node-deadline", "round-deadline"),
    *("evaluate-every", "checkpoint-every", "adapt-lrs", "adapt-steps", "test-shots"),
}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation. Whatever a user can mend ends the run as failed, with one sentence and no traceback."""
    try:
        run_federation(PollingGrid(grid), parse_run_config(context.run_config))
    except (QuickbloomError, RunError):
        # Flower logs the exception; the sentence says it all, the stack says nothing to a user.
        sys.tracebacklimit = 0
        raise


def run_federation(grid: Grid, config: RunConfig) -> dict[str, Any]:
    """Train, test, and leave everything in the run directory; returns the summary."""
    started = time.monotonic(), _cpu_seconds()
    config = config.resolved()
    torch.set_num_threads(1)
    directory = RunDirectory.create(config.output_dir, f"{config.dataset}-{config.algorithm}-seed{config.seed}")
    directory.write_json("config.json", config.flat())
    log(INFO, "Run directory: %s", directory.path)
    population = call_roll(grid, config)
    spec = population.spec
    algorithm = build_algorithm(config, spec)
    outer = OuterOptimizer(algorithm.options, algorithm.init(), config.rounds)
    done, lineage = _resume(config, population, outer) if config.resume_from else (0, uuid.uuid4().hex)
    if done and algorithm.fresh():
        log(WARNING, "Task state is on the nodes: it goes on where `state-dir` has kept it, and starts afresh on other nodes")
    facts = {"config": config.flat(), "spec": [spec.kind, list(spec.input_shape), spec.outputs], "splits": population.splits}
    facts |= {"lineage": lineage}

    def on_round(record: dict[str, Any]) -> None:
        directory.append_round(record)
        number = record["round"]
        if number == config.rounds or (config.checkpoint_every and number % config.checkpoint_every == 0):
            checkpoint.save(directory.checkpoints, number, outer.state(), facts)

    strategy = MetaStrategy(config, population, algorithm, outer, on_round, first_round=done + 1, lineage=lineage)
    strategy.start(grid, to_arrays(outer.meta), num_rounds=config.rounds - done, timeout=config.round_deadline)
    return _conclude(grid, strategy, directory, started)


def _resume(config: RunConfig, population: Population, outer: OuterOptimizer) -> tuple[int, str]:
    """Put `outer` where the checkpoint `resume-from` left it; returns how many rounds are done, and the training's lineage."""
    tensors, facts = checkpoint.load(Path(config.resume_from))
    before, now = facts["config"], config.flat()
    for key in sorted(before.keys() | now.keys()):
        if key not in _MAY_CHANGE and before.get(key) != now.get(key):
            raise ConfigError(f"`{key}` must be {before.get(key)!r} as in the run to go on from, got {now.get(key)!r}")
    if population.splits != facts["splits"]:
        # Otherwise tasks that were trained on could end up among those that are tested.
        raise ConfigError("`resume-from` needs the tasks of the run to go on from: connect the same nodes with the same data")
    if reason := mismatch({k.removeprefix("meta/"): v for k, v in tensors.items() if k.startswith("meta/")}, outer.meta):
        raise ConfigError(f"`resume-from` names a checkpoint of another model: {reason}")
    done = int(facts["round"])
    if done >= config.rounds:
        raise ConfigError(f"`resume-from` names a run that is finished: its checkpoint is of round {done} of {config.rounds}")
    outer.restore(tensors)
    log(INFO, "Going on after round %s of %s", done, config.rounds)
    return done, str(facts["lineage"])


def _conclude(grid: Grid, strategy: MetaStrategy, directory: RunDirectory, started: tuple[float, float]) -> dict[str, Any]:
    """Choose the adaptation rate on the validation tasks, score the test tasks once, write the results."""
    config, population = strategy.config, strategy.population
    validation = strategy.last_validation
    if validation is not None and validation.task_ids:
        lr, steps = strategy.choose_rate(validation)
    else:
        if population.splits["validation"]:
            log(WARNING, "No validation task could be scored: the inner rate and all %s steps are used", config.adapt_steps)
        lr, steps = strategy.algorithm.options.inner_lr, config.adapt_steps
    test = strategy.score_tasks(grid, strategy.outer.meta, population.splits["test"], [lr])
    if population.splits["test"] and not test.task_ids:
        raise RunError("no node sent a usable score of the test tasks: the log above names the reasons")
    rounds = read_history(directory.path)
    summary = {
        "schema": 1,
        "algorithm": config.algorithm,
        "dataset": config.dataset,
        "seed": config.seed,
        "rounds": config.rounds,
        "run_dir": str(directory.path),
        "tasks": {name: len(ids) for name, ids in population.splits.items()},
        "chosen": {"adapt_lr": lr, "adapt_steps": steps},
        "test": _describe(strategy, test, lr),
        "validation": _describe(strategy, validation, lr),
        "shots": _score_shots(grid, strategy, lr, steps),
        "bytes": strategy.bytes,
        "seconds": {
            "total": round(time.monotonic() - started[0], 3),
            "cpu": round(_cpu_seconds() - started[1], 3),
            "round_median": float(np.median([record["seconds"] for record in rounds])),
        },
        "failures": strategy.failures,
        "versions": {
            "quickbloom": __version__,
            "flwr": flwr.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    directory.write_per_task(_rows(population, "validation", validation, lr) + _rows(population, "test", test, lr))
    directory.write_json("summary.json", summary)
    for line in result_lines(summary):
        log(INFO, "%s", line)
    log(INFO, "%s%s", SUMMARY, to_json(summary))
    return summary


def _describe(strategy: MetaStrategy, scores: Scores | None, lr: float) -> dict[str, Any] | None:
    """Mean, spread and worst tenth at every step; None where no held-out task was scored."""
    if scores is None or not scores.task_ids:
        return None
    at = scores.lrs.index(lr)
    name = "accuracy" if strategy.higher_is_better else "mse"
    return {
        "steps": list(range(scores.metrics.shape[2])),
        name: spread(scores.metrics[:, at], higher_is_better=strategy.higher_is_better),
        "loss": spread(scores.losses[:, at], higher_is_better=False),
    }


def _cpu_seconds() -> float:
    """Of this process, and of those that it started and that have ended: a compiler's, say."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _score_shots(grid: Grid, strategy: MetaStrategy, lr: float, steps: int) -> dict[str, Any] | None:
    """The test tasks adapted on few examples, at the chosen step; None where `test-shots` asks for nothing that they have.

    A number above `_most_shots` would score all examples: it is left out.
    """
    spec, test = strategy.population.spec, strategy.population.splits["test"]
    support = max((strategy.population.tasks[task_id].num_support for task_id in test), default=0)
    most = _most_shots(support, spec.outputs if spec.kind == "classification" else 1)
    scored: dict[int, Scores] = {}
    for shots in strategy.config.shots:
        if shots <= most:
            scores = strategy.score_tasks(grid, strategy.outer.meta, test, [lr], shots)
            scored |= {shots: scores} if scores.task_ids else {}
    if not scored:
        return None

    def columns(values: Iterable[np.ndarray[Any, Any]], *, higher_is_better: bool) -> dict[str, list[float]]:
        spreads = [spread(value[:, 0, [steps]], higher_is_better=higher_is_better) for value in values]
        return {part: [one[part][0] for one in spreads] for part in spreads[0]}

    name, better = ("accuracy", True) if strategy.higher_is_better else ("mse", False)
    return {
        "shots": list(scored),
        name: columns((scores.metrics for scores in scored.values()), higher_is_better=better),
        "loss": columns((scores.losses for scores in scored.values()), higher_is_better=False),
    }


def _most_shots(support: int, classes: int) -> int:
    """The largest number of examples per class that is worth a score, for tasks with at most so many support examples.

    The server does not know how these are spread over the classes: taken to be evenly, unless there are more classes than
    examples, as with characters of text; then all may be of one class. (10, 5) -> 2; (20, 76) -> 20.
    """
    return support // classes if support >= classes else support


def _rows(population: Population, split: str, scores: Scores | None, lr: float) -> list[dict[str, Any]]:
    if scores is None:
        return []
    at = scores.lrs.index(lr)
    name = "accuracy" if population.spec.kind == "classification" else "mse"
    rows = []
    for i, task_id in enumerate(scores.task_ids):
        info = population.tasks[task_id]
        row: dict[str, Any] = {"task": task_id, "split": split, "num_support": info.num_support, "num_test": info.num_test}
        row |= {f"{name}_step{step}": value for step, value in enumerate(scores.metrics[i, at].tolist())}
        row |= {f"loss_step{step}": value for step, value in enumerate(scores.losses[i, at].tolist())}
        rows.append(row)
    return rows
