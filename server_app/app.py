"""The ServerApp: settings -> roll call -> rounds -> final test -> run directory."""

import os
import platform
import sys
import time
from collections.abc import Iterable
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import flwr
import numpy as np
import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from quickbloom import __version__
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import ConfigError, QuickbloomError
from quickbloom.common.flower import registry
from quickbloom.common.flower.names import log
from quickbloom.common.personal.model import description
from quickbloom.common.printable import keep_log_to_lines
from quickbloom.common.wording import data_name
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.privacy import Ledger, TaskPrivacy
from quickbloom.server_app.federation.roll_call import Population, call_roll
from quickbloom.server_app.federation.scores import Scores
from quickbloom.server_app.federation.strategy import MetaStrategy, RunError
from quickbloom.server_app.messaging.in_process_grid import InlineGrid
from quickbloom.server_app.messaging.polling_grid import PollingGrid, hands_over
from quickbloom.server_app.reporting.live import SUMMARY, result_lines
from quickbloom.server_app.runs import resume, trackers
from quickbloom.server_app.runs.checkpoints import Checkpoint, CheckpointWriter
from quickbloom.server_app.runs.directory import RunDirectory, read_history, spread, to_json

app = ServerApp()
keep_log_to_lines()

LEDGER = "privacy.jsonl"
SECOND = {"accuracy": "balanced_accuracy", "mse": "rmse"}
"""What the second score of a user's own data is called, by the first."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation. Whatever a user can mend ends the run as failed, with one sentence and no traceback."""
    registry.apply("pull-soon", "assembly-by-parts")
    try:
        known = context.run_config
        config = parse_run_config(known)
        if config.resume_from:
            before = resume.load_checked(Path(config.resume_from), lambda _: None)
            given = resume.with_settings_of(before, grid.run.override_config)
            config = parse_run_config(given).resolved()
        # Flower tells the nodes the settings that it knows; those that come from a checkpoint are told by the server.
        unknown = {key: value for key, value in config.flat().items() if config.resume_from and known.get(key) != value}
        run_federation(PollingGrid(grid, unknown, packs=not hands_over(grid)), config)
    except (QuickbloomError, RunError):
        # Flower logs the exception; the sentence says it all, the stack says nothing to a user.
        sys.tracebacklimit = 0
        raise


def run_federation(grid: Grid, config: RunConfig) -> dict[str, Any]:
    """Train, test, and leave everything in the run directory; returns the summary."""
    clock = _Clock()
    config = config.resolved()
    torch.set_num_threads(1)
    trackers.check(config)
    checkpoint = resume.open_checkpoint(config) if config.resume_from else None
    in_place = resume.goes_on_in_place(config)
    setting = config.output_dir or (config.resume_from if in_place else "")
    directory = RunDirectory.create(setting, f"{config.dataset}-{config.algorithm}-seed{config.seed}", again=in_place)
    log(INFO, "Run directory: %s", directory.path)
    with directory.held():
        return _run_in(directory, grid, config, checkpoint, clock)


def _run_in(
    directory: RunDirectory, grid: Grid, config: RunConfig, checkpoint: Checkpoint | None, clock: "_Clock"
) -> dict[str, Any]:
    if checkpoint is None:
        directory.write_json("config.json", config.flat())
    population = call_roll(grid, config, str(checkpoint.facts.get("schema", "")) if checkpoint else "")
    spec, done = population.spec, int(checkpoint.facts["round"]) if checkpoint else 0
    if checkpoint is not None and config.privacy.on:
        ledger = Ledger(directory.path / LEDGER)
        ledger.take_over(Ledger(resume.run_of(Path(config.resume_from)) / LEDGER))
        ledger.at_least(resume.noisy_steps(checkpoint))
    privacy, config = _with_privacy(config, population, directory, done)
    algorithm = build_algorithm(config, spec)
    outer = OuterOptimizer(algorithm.options, algorithm.init(), config.rounds)
    algorithm.learner.drop_numbers()  # they are the outer optimizer's now
    origin = resume.origin_of(checkpoint, config)
    if checkpoint is not None:
        # Only now is it known that the run can go on: until here nothing of it was touched.
        resume.restore_model(checkpoint, population, outer)
        clock.add(checkpoint.facts["so-far"]["seconds"])
        directory.write_json("config.json", config.flat())
        resume.cut_history(checkpoint, Path(config.resume_from), directory)
        if algorithm.fresh():
            log(
                WARNING,
                "Task state is on the nodes: it goes on where `state-dir` has kept it, and starts afresh on other nodes",
            )
    writer = CheckpointWriter(
        directory.checkpoints,
        {
            **description(config, spec),
            "config": config.flat(),
            "splits": population.splits,
            "lineage": origin.lineage,
            "branch": origin.branch,
            "nodes": len(set(population.homes.values())),
            "in-process": isinstance(grid, InlineGrid),
        },
    )

    def save(number: int) -> None:
        last = number == config.rounds
        scores, said = resume.score_tensors(strategy.last_validation if last else None)
        lr, steps = strategy.chosen_rate()
        said["adapt"] = {"lr": lr, "steps": steps}
        writer.write(number, outer.state() | scores, resume.counts(strategy, clock.read(), origin.resumed) | said, last=last)

    def on_round(record: dict[str, Any]) -> None:
        directory.append_round(record)
        live.round(record, _clients_of_round(strategy, record))
        number = record["round"]
        if number == config.rounds or (config.checkpoint_every and number % config.checkpoint_every == 0):
            save(number)

    strategy = MetaStrategy(config, population, algorithm, outer, on_round, done + 1, origin.lineage, privacy)
    if checkpoint is not None:
        resume.restore_counts(checkpoint, strategy)
    with trackers.tracked(config, directory.path, done, origin.branch) as live:
        if checkpoint is None and config.checkpoint_every:
            save(0)  # so that the run can go on from its first moment
        strategy.start(grid, ArrayRecord(), num_rounds=config.rounds, timeout=config.round_deadline)
        return _conclude(grid, strategy, directory, clock, origin.resumed, live)


def _with_privacy(
    config: RunConfig, population: Population, directory: RunDirectory, done: int
) -> tuple[TaskPrivacy | None, RunConfig]:
    """The privacy of a run of which so many rounds are done, and its settings with as many rounds as the budget allows."""
    if not config.privacy.on:
        return None, config
    train = len(population.splits["train"])
    privacy = TaskPrivacy(config.privacy, train, config.tasks_in_round(train), Ledger(directory.path / LEDGER))
    if config.privacy.noise_seed >= 0:
        log(WARNING, "Privacy noise is seeded (`privacy.noise-seed`): anybody can subtract it, so this run protects nobody")
    if config.privacy.delta > 1 / train:
        log(WARNING, "Privacy delta is %g, above 1 / %s training tasks: it should be well below", config.privacy.delta, train)
    allowed = privacy.steps_within_budget(config.rounds - done)
    if allowed < config.rounds - done:
        if not done + allowed:
            raise ConfigError(
                f"`privacy.epsilon` must be at least {privacy.epsilon(privacy.released + 1):.3g} for a single round with these "
                f"settings, got {config.privacy.epsilon:g}: raise it or `privacy.noise-multiplier`, or let fewer tasks in"
            )
        log(WARNING, "Privacy budget is %g, so training ends after round %s", config.privacy.epsilon, done + allowed)
        config = config.model_copy(update={"rounds": done + allowed})
        if not done:  # a run that goes on writes its settings once it is known that it can
            directory.write_json("config.json", config.flat())
    return privacy, config


class _Clock:
    """Seconds of this process since now, and of the parts of the run before it."""

    def __init__(self) -> None:
        self._started = time.monotonic(), _cpu_seconds()
        self._before = {"total": 0.0, "cpu": 0.0}

    def add(self, before: dict[str, float]) -> None:
        self._before = dict(before)

    def read(self) -> dict[str, float]:
        now = {"total": time.monotonic() - self._started[0], "cpu": _cpu_seconds() - self._started[1]}
        return {name: round(value + self._before[name], 3) for name, value in now.items()}


def _clients_of_round(strategy: MetaStrategy, record: dict[str, Any]) -> trackers.Clients:
    """What a round said of single clients: training tasks, and validation tasks where it evaluated."""
    known = record["train"]["tasks"] and strategy.client_losses
    found = {"train/loss": np.array(strategy.client_losses)} if known else {}
    if "validation" in record:
        found |= _clients_of(strategy, "validation", strategy.last_validation, *strategy.chosen_rate())
    return found


def _clients_of(strategy: MetaStrategy, split: str, scores: Scores | None, lr: float, step: int) -> trackers.Clients:
    """Every held-out task's score before and after adaptation."""
    if scores is None or not scores.task_ids:
        return {}
    name = "accuracy" if strategy.higher_is_better else "mse"
    values = scores.metrics[:, scores.lrs.index(lr)]
    return {f"{split}/{name}_before": values[:, 0], f"{split}/{name}_after": values[:, step]}


def _conclude(
    grid: Grid, strategy: MetaStrategy, directory: RunDirectory, clock: _Clock, resumed: int, live: trackers.Trackers
) -> dict[str, Any]:
    """Choose the adaptation rate on the validation tasks, score the test tasks once, write the results."""
    config, population = strategy.config, strategy.population
    validation = strategy.last_validation
    if validation is not None and (validation.lrs != strategy.lrs or validation.metrics.shape[-1] != config.adapt_steps + 1):
        # Training was over, and the run is gone on with under other rates or steps.
        validation = strategy.score_tasks(grid, strategy.outer.leaves, population.splits["validation"], strategy.lrs)
        strategy.last_validation = validation
    if population.splits["validation"] and (validation is None or not validation.task_ids):
        log(WARNING, "No validation task could be scored: the inner rate and all %s steps are used", config.adapt_steps)
    lr, steps = strategy.chosen_rate()
    test = strategy.score_tasks(grid, strategy.outer.leaves, population.splits["test"], [lr])
    if population.splits["test"] and not test.task_ids:
        raise RunError("no node sent a usable score of the test tasks: the log above names the reasons")
    shots = _score_shots(grid, strategy, lr, steps)
    strategy.let_keep(grid, strategy.outer.leaves, lr, steps, directory.path.name)
    rounds = read_history(directory.path)
    summary = {
        "schema": 1,
        "algorithm": config.algorithm,
        "dataset": config.dataset,
        "data": data_name(config.flat()),
        "seed": config.seed,
        "rounds": config.rounds,
        "run_dir": str(directory.path),
        "tasks": {name: len(ids) for name, ids in population.splits.items()},
        "chosen": {"adapt_lr": lr, "adapt_steps": steps},
        "test": _describe(strategy, test, lr),
        "validation": _describe(strategy, validation, lr),
        "best_validation": strategy.best,
        "shots": shots,
        "bytes": strategy.bytes,
        "seconds": {**clock.read(), "round_median": float(np.median([record["seconds"] for record in rounds]))},
        "privacy": strategy.privacy.record() if strategy.privacy else None,
        "failures": strategy.failures,
        "late": strategy.late + strategy.nodes.late.total(),
        "resumed": resumed,
        "versions": {
            "quickbloom": __version__,
            "flwr": flwr.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    directory.write_per_task(_rows(population, "validation", validation, lr) + _rows(population, "test", test, lr))
    directory.write_json("summary.json", summary)
    live.end(summary, _clients_of(strategy, "test", test, lr, steps))
    for line in result_lines(summary):
        log(INFO, "%s", line)
    log(INFO, "%s%s", SUMMARY, to_json(summary))
    return summary


def _describe(strategy: MetaStrategy, scores: Scores | None, lr: float) -> dict[str, Any] | None:
    """Mean, spread and worst tenth at every step; None where no held-out task was scored."""
    if scores is None or not scores.task_ids:
        return None
    at = scores.lrs.index(lr)
    name, better = ("accuracy", True) if strategy.higher_is_better else ("mse", False)
    second = {} if scores.second is None else {SECOND[name]: spread(scores.second[:, at], higher_is_better=better)}
    return {
        "steps": list(range(scores.metrics.shape[2])),
        name: spread(scores.metrics[:, at], higher_is_better=better),
        "loss": spread(scores.losses[:, at], higher_is_better=False),
        **second,
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
            scores = strategy.score_tasks(grid, strategy.outer.leaves, test, [lr], shots)
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
        if scores.second is not None:
            row |= {f"{SECOND[name]}_step{step}": value for step, value in enumerate(scores.second[i, at].tolist())}
        rows.append(row)
    return rows
