"""The ServerApp: settings -> roll call -> rounds -> final test -> run directory."""

import os
import sys
import time
from contextlib import ExitStack
from logging import INFO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import ConfigError, QuickbloomError
from quickbloom.common.files import shown
from quickbloom.common.flower import registry
from quickbloom.common.flower.names import log
from quickbloom.common.personal.model import description
from quickbloom.common.printable import keep_log_to_lines
from quickbloom.common.wording import data_name
from quickbloom.server_app.events.channel import Events, Warn, into_log
from quickbloom.server_app.events.file import written
from quickbloom.server_app.events.kinds import Saved, Started
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.privacy import Ledger, TaskPrivacy
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.federation.strategy import MetaStrategy, RunError
from quickbloom.server_app.messaging.in_process_grid import InlineGrid
from quickbloom.server_app.messaging.polling_grid import PollingGrid, hands_over
from quickbloom.server_app.messaging.population import Population
from quickbloom.server_app.runs import resume, trackers
from quickbloom.server_app.runs.checkpoints import Checkpoint, CheckpointWriter
from quickbloom.server_app.runs.directory import RunDirectory
from quickbloom.server_app.summary import clients_of, conclude

app = ServerApp()
keep_log_to_lines()

LEDGER = "privacy.jsonl"


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation. A mistake that a user can mend ends the run as failed, with one sentence and no traceback."""
    registry.apply("pull-soon", "assembly-by-parts")
    events = Events(into_log)
    try:
        known = context.run_config
        config = parse_run_config(known)
        if config.resume_from:
            before = resume.load_checked(Path(config.resume_from), lambda _: None)
            given = resume.with_settings_of(before, grid.run.override_config)
            config = parse_run_config(given).resolved()
        # Flower gives the nodes the settings that it knows; the server gives them those of a checkpoint.
        unknown = {key: value for key, value in config.flat().items() if config.resume_from and known.get(key) != value}
        run_federation(PollingGrid(grid, unknown, packs=not hands_over(grid)), config, events)
    except (QuickbloomError, RunError) as error:
        events.stop(str(error))
        # Flower logs the exception; the sentence is complete, and the stack does not help a user.
        sys.tracebacklimit = 0
        raise


def run_federation(grid: Grid, config: RunConfig, events: Events | None = None) -> dict[str, Any]:
    """Train, test, and write everything into the run directory. Return the summary. `events`: receives what happens."""
    clock = _Clock()
    events = events or Events()
    config = config.resolved()
    torch.set_num_threads(1)
    trackers.check(config)
    checkpoint = resume.open_checkpoint(config, events.warn) if config.resume_from else None
    in_place = resume.goes_on_in_place(config)
    setting = config.output_dir or (config.resume_from if in_place else "")
    directory = RunDirectory.create(setting, f"{config.dataset}-{config.algorithm}-seed{config.seed}", again=in_place)
    log(INFO, "Run directory: %s", directory.path)
    with directory.held(), ExitStack() as until_end:
        events.tell(_started(directory, config, checkpoint))
        try:
            return _run_in(directory, grid, config, checkpoint, clock, events, until_end)
        except (QuickbloomError, RunError) as error:
            events.stop(str(error))
            raise


def _started(directory: RunDirectory, config: RunConfig, checkpoint: Checkpoint | None) -> Started:
    flat, done = config.flat(), int(checkpoint.facts["round"]) if checkpoint else 0
    return Started(shown(str(directory.path)), config.algorithm, data_name(flat), config.seed, config.rounds, done)


def _run_in(
    directory: RunDirectory,
    grid: Grid,
    config: RunConfig,
    checkpoint: Checkpoint | None,
    clock: "_Clock",
    events: Events,
    until_end: ExitStack,
) -> dict[str, Any]:
    if checkpoint is None:
        directory.write_json("config.json", config.flat())
        events.join(until_end.enter_context(written(directory.path)))
    population = call_roll(grid, config, str(checkpoint.facts.get("schema", "")) if checkpoint else "", events)
    spec, done = population.spec, int(checkpoint.facts["round"]) if checkpoint else 0
    if checkpoint is not None and config.privacy.on:
        ledger = Ledger(directory.path / LEDGER)
        ledger.take_over(Ledger(resume.run_of(Path(config.resume_from)) / LEDGER))
        ledger.at_least(resume.noisy_steps(checkpoint))
    privacy, config = _with_privacy(config, population, directory, done, events.warn)
    algorithm = build_algorithm(config, spec)
    outer = OuterOptimizer(algorithm.options, algorithm.init(), config.rounds)
    algorithm.learner.drop_numbers()  # the outer optimizer holds them now
    origin = resume.origin_of(checkpoint, config)
    if checkpoint is not None:
        # Only now is it certain that the run can continue: until here nothing of it was changed.
        resume.restore_model(checkpoint, population, outer)
        clock.add(checkpoint.facts["so-far"]["seconds"])
        directory.write_json("config.json", config.flat())
        source = Path(config.resume_from)
        resume.cut_history(checkpoint, source, directory, events.warn)
        events.join(until_end.enter_context(written(directory.path, resume.events_before(checkpoint, source))))
        if algorithm.fresh():
            events.warn(
                "Task state is on the nodes: it goes on where `state-dir` has kept it, and starts afresh on other nodes"
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
        scores, said = resume.score_tensors(strategy.evaluation.last if last else None)
        lr, steps = strategy.chosen_rate()
        said["adapt"] = {"lr": lr, "steps": steps}
        counts = resume.counts(strategy, clock.read(), origin.resumed)
        path = writer.write(number, outer.state() | scores, counts | said, last=last)
        events.tell(Saved(number, str(path.relative_to(directory.path))))

    def on_round(record: dict[str, Any]) -> None:
        directory.append_round(record)
        live.round(record, _clients_of_round(strategy, record))
        number = record["round"]
        if number == config.rounds or (config.checkpoint_every and number % config.checkpoint_every == 0):
            save(number)

    strategy = MetaStrategy(config, population, algorithm, outer, on_round, done + 1, origin.lineage, privacy, events)
    if checkpoint is not None:
        resume.restore_counts(checkpoint, strategy)
    with trackers.tracked(config, directory.path, done, origin.branch, events.warn) as live:
        if checkpoint is None and config.checkpoint_every:
            save(0)  # so that the run can be resumed from its first moment
        strategy.start(grid, ArrayRecord(), num_rounds=config.rounds, timeout=config.round_deadline)
        return conclude(grid, strategy, directory, clock.read, origin.resumed, live)


def _with_privacy(
    config: RunConfig, population: Population, directory: RunDirectory, done: int, warn: Warn
) -> tuple[TaskPrivacy | None, RunConfig]:
    """Return the privacy of a run after so many rounds, and its settings with as many rounds as the budget allows."""
    if not config.privacy.on:
        return None, config
    train = len(population.splits["train"])
    privacy = TaskPrivacy(config.privacy, train, config.tasks_in_round(train), Ledger(directory.path / LEDGER))
    if config.privacy.noise_seed >= 0:
        warn("Privacy noise is seeded (`privacy.noise-seed`): anybody can subtract it, so this run protects nobody")
    if config.privacy.delta > 1 / train:
        warn(f"Privacy delta is {config.privacy.delta:g}, above 1 / {train} training tasks: it should be well below")
    allowed = privacy.steps_within_budget(config.rounds - done)
    if allowed < config.rounds - done:
        if not done + allowed:
            raise ConfigError(
                f"`privacy.epsilon` must be at least {privacy.epsilon(privacy.released + 1):.3g} for a single round with these "
                f"settings, got {config.privacy.epsilon:g}: raise it or `privacy.noise-multiplier`, or let fewer tasks in"
            )
        warn(f"Privacy budget is {config.privacy.epsilon:g}, so training ends after round {done + allowed}")
        config = config.model_copy(update={"rounds": done + allowed})
        if not done:  # a continued run writes its settings once it is certain that it can continue
            directory.write_json("config.json", config.flat())
    return privacy, config


class _Clock:
    """Seconds of this process from now on, plus those of the earlier parts of the run."""

    def __init__(self) -> None:
        self._started = time.monotonic(), _cpu_seconds()
        self._before = {"total": 0.0, "cpu": 0.0}

    def add(self, before: dict[str, float]) -> None:
        self._before = dict(before)

    def read(self) -> dict[str, float]:
        now = {"total": time.monotonic() - self._started[0], "cpu": _cpu_seconds() - self._started[1]}
        return {name: round(value + self._before[name], 3) for name, value in now.items()}


def _clients_of_round(strategy: MetaStrategy, record: dict[str, Any]) -> trackers.Clients:
    """Return what a round reported of single clients: training tasks, and validation tasks if it evaluated."""
    known = record["train"]["tasks"] and strategy.client_losses
    found = {"train/loss": np.array(strategy.client_losses)} if known else {}
    if "validation" in record:
        found |= clients_of(strategy, "validation", strategy.evaluation.last, *strategy.chosen_rate())
    return found


def _cpu_seconds() -> float:
    """Return the processor seconds of this process and of its finished children, such as a compiler."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
