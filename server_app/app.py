"""The ServerApp: settings -> roll call -> rounds -> final test -> run directory."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from logging import INFO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets.own import OwnOptions
from quickbloom.common.datasets.own.columns import Schema
from quickbloom.common.engine.build import build_algorithm, constants_of
from quickbloom.common.errors import ConfigError, QuickbloomError
from quickbloom.common.files import shown
from quickbloom.common.flower import registry
from quickbloom.common.flower.names import log
from quickbloom.common.formatting import data_name
from quickbloom.common.personal import carried, facts
from quickbloom.common.personal.model import description
from quickbloom.common.printable import keep_log_to_lines
from quickbloom.server_app.events.channel import Events, Warn, into_log
from quickbloom.server_app.events.file import written
from quickbloom.server_app.events.kinds import Event, Saved, Started
from quickbloom.server_app.federation.agreeing import centres, metric_for, share_means, share_scales
from quickbloom.server_app.federation.best import keeps_best
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.private.privacy import Ledger, TaskPrivacy
from quickbloom.server_app.federation.robust.root_set import root_set
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.federation.sampling import seen_users
from quickbloom.server_app.federation.strategy import MetaStrategy
from quickbloom.server_app.messaging.clock import clock_of
from quickbloom.server_app.messaging.devices import devices_of
from quickbloom.server_app.messaging.polling_grid import PollingGrid, hands_over
from quickbloom.server_app.messaging.population import Population
from quickbloom.server_app.messaging.runtimes import DEPLOYMENT, IN_PROCESS, cpu_of, runtime_of
from quickbloom.server_app.messaging.virtual_grid import VirtualGrid
from quickbloom.server_app.runs import resume, trackers
from quickbloom.server_app.runs.best_model import BestModel
from quickbloom.server_app.runs.checkpoints import Checkpoint, CheckpointWriter
from quickbloom.server_app.runs.directory import RunDirectory
from quickbloom.server_app.runs.holdings import HOLDINGS, write_holdings
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
    except QuickbloomError as error:
        events.stop(str(error))
        # Flower logs the exception; the sentence is complete, and the stack does not help a user.
        sys.tracebacklimit = 0
        raise


def run_federation(grid: Grid, config: RunConfig, events: Events | None = None) -> dict[str, Any]:
    """Train, test, and write everything into the run directory. Return the summary. `events`: receives what happens."""
    clock = _Clock(grid)
    events = events or Events()
    config = config.resolved()
    grid = _with_devices(grid, config)
    torch.set_num_threads(1)
    trackers.check(config)
    checkpoint = resume.open_checkpoint(config, events.warn) if config.resume_from else None
    if checkpoint is not None and config.metric == "auto":
        config = config.model_copy(update={"metric": resume.metric_of(checkpoint)})
    in_place = resume.goes_on_in_place(config)
    setting = config.output_dir or (config.resume_from if in_place else "")
    directory = RunDirectory.create(setting, f"{config.dataset}-{config.algorithm}-seed{config.seed}", again=in_place)
    log(INFO, "Run directory: %s", directory.path)
    with directory.held(), ExitStack() as until_end:
        run = _Run(directory, config, checkpoint, clock, events, until_end)
        events.tell(
            Started(shown(directory.path), config.algorithm, data_name(config.flat()), config.seed, config.rounds, run.done)
        )
        try:
            return run.go(grid)
        except QuickbloomError as error:
            events.stop(str(error))
            raise


@dataclass
class _Run:
    """One run in its directory. `checkpoint`: where it goes on, if it does; `until_end`: closes what is open till then."""

    directory: RunDirectory
    config: RunConfig
    checkpoint: Checkpoint | None
    clock: "_Clock"
    events: Events
    until_end: ExitStack

    @property
    def done(self) -> int:
        """Rounds that were done before."""
        return int(self.checkpoint.facts["round"]) if self.checkpoint else 0

    def go(self, grid: Grid) -> dict[str, Any]:
        """From the roll call to the summary."""
        if self.checkpoint is None:
            self._begin([])
        before = resume.tasks_before(self.checkpoint) if self.checkpoint else None
        constants = partial(constants_of, self.config)
        population = call_roll(grid, self.config, self._schema(), self.events, constants, before)
        seen_users(self.config, population)  # to learn now, and not after training, that there are none
        self._note_holdings(grid, population)
        self._count_earlier_noise()
        privacy, self.config = _with_privacy(self.config, population, self.directory, self.done, self.events.warn)
        if self.checkpoint is None:
            self._agree(grid, population, privacy)
        algorithm = build_algorithm(self.config, population.spec)
        for remark in algorithm.learner.remarks:
            self.events.warn(remark)
        root = root_set(self.config, population, algorithm)
        outer = OuterOptimizer(algorithm.options, algorithm.init(), self.config.rounds, algorithm.server_state())
        if root is None:
            algorithm.learner.drop_numbers()  # they are the outer optimizer's now
        origin = resume.origin_of(self.checkpoint, self.config)
        if self.checkpoint is not None:
            facts.check_constants(self.checkpoint.facts, algorithm.learner.digest, "the run to go on from")
            self._take_up(self.checkpoint, outer, on_nodes=bool(algorithm.fresh() or self.config.node_momentum))
        writer = self._writer(grid, population, origin, algorithm.learner.digest)
        keeper = _Keeper(self, outer, origin, writer)
        keeper.grid = grid
        strategy = keeper.strategy = MetaStrategy(
            self.config,
            population,
            algorithm,
            outer,
            keeper.on_round,
            self.done + 1,
            origin.lineage,
            privacy,
            self.events,
            clock_of(grid),
            root,
        )
        if keeps_best(self.config, population, algorithm, self.events.warn):
            keeper.best = BestModel(strategy, writer, self.events.warn)
        if self.checkpoint is not None:
            resume.restore_counts(self.checkpoint, strategy)
            if keeper.best:
                keeper.best.restore(self.checkpoint)
        with trackers.tracked(self.config, self.directory.path, self.done, origin.branch, self.events.warn) as live:
            keeper.live = live
            keeper.begin(grid)
            with self._slow_devices(grid, population):
                strategy.start(grid, ArrayRecord(), num_rounds=self.config.rounds, timeout=self.config.round_deadline)
            keeper.end(grid)
            return conclude(grid, strategy, self.directory, self.clock.read, origin.resumed, live)

    def _begin(self, before: Iterable[Event]) -> None:
        """Write the settings, and the events, which begin with those `before`."""
        self.directory.write_json("config.json", self.config.flat())
        self.events.join(self.until_end.enter_context(written(self.directory.path, before)))

    def _agree(self, grid: Grid, population: Population, privacy: TaskPrivacy | None) -> None:
        """Let the nodes agree on scales, and find what the run is scored by."""
        share_means(grid, self.config, population, self.events, privacy)
        counts = share_scales(grid, self.config, population, self.events.warn)
        metric = metric_for(self.config, population, counts, self.events.warn)
        self.config = self.config.model_copy(update={"metric": metric})
        self.directory.write_json("config.json", self.config.flat())

    def _note_holdings(self, grid: Grid, population: Population) -> None:
        """Write who holds what, where users are simulated here: this process can read the table, and no node is asked."""
        if self.config.spread is None or runtime_of(grid) == DEPLOYMENT:
            return
        try:
            write_holdings(self.directory, self.config, population.splits)
        except QuickbloomError as error:
            self.events.warn(f"No {HOLDINGS} is written: {error}")

    def _schema(self) -> str:
        return str(self.checkpoint.facts.get("schema", "")) if self.checkpoint else ""

    def _count_earlier_noise(self) -> None:
        """Steps with noise that were taken before count for the budget."""
        if self.checkpoint is not None and self.config.privacy.on:
            ledger = Ledger(self.directory.path / LEDGER)
            ledger.take_over(Ledger(resume.run_of(Path(self.config.resume_from)) / LEDGER))
            levels = resume.noise_levels(self.checkpoint) if self.config.privacy.noise == "tree" else None
            ledger.at_least(resume.noisy_steps(self.checkpoint), levels)

    def _take_up(self, checkpoint: Checkpoint, outer: OuterOptimizer, *, on_nodes: bool) -> None:
        """Go on where `checkpoint` was written. `on_nodes`: tasks have a state there."""
        # Only now is it known that the run can go on: until here nothing of it was touched.
        resume.restore_model(checkpoint, outer)
        self.clock.add(checkpoint.facts["so-far"]["seconds"])
        source = Path(self.config.resume_from)
        before = resume.events_before(checkpoint, source)
        resume.cut_history(checkpoint, source, self.directory, self.events.warn)
        self._begin(before)
        if on_nodes:
            self.events.warn(
                "Task state is on the nodes: it goes on where `state-dir` has kept it, and starts afresh on other nodes"
            )

    @contextmanager
    def _slow_devices(self, grid: Grid, population: Population) -> Iterator[None]:
        """Within this context the nodes that train are as slow as the setting `devices` says."""
        if not isinstance(grid, VirtualGrid):
            yield
            return
        names: dict[int, str] = {}
        for task_id in population.splits["train"]:
            names.setdefault(population.homes[task_id], task_id)
        before = self.checkpoint.facts["so-far"].get("virtual-seconds", 0.0) if self.checkpoint else 0.0
        grid.begin(devices_of(self.config.devices, self.config.seed, names), float(before))
        if (hours := grid.clock.now() / 3600) > before / 3600:
            self.events.warn(f"None of the simulated `devices` is there yet: the run waits until {hours % 24:.1f} o'clock")
        yield
        grid.end()

    def _writer(self, grid: Grid, population: Population, origin: resume.Origin, constants: str) -> CheckpointWriter:
        said = {
            **description(self.config, population.spec, constants),
            "config": self.config.flat(),
            "splits": population.splits,
            "lineage": origin.lineage,
            "branch": origin.branch,
            "nodes": len(set(population.homes.values())),
            "in-process": runtime_of(grid) == IN_PROCESS,
        }
        return CheckpointWriter(self.directory.checkpoints, said, self._encoder(population))

    def _encoder(self, population: Population) -> dict[str, Tensor]:
        """Return the small encoder that the last checkpoint carries; {} for none, or if its file is on the nodes alone."""
        own = self.config.table(self.config.dataset)
        if not isinstance(own, OwnOptions):
            return {}
        try:
            return carried.packed(own, Schema.from_json(population.spec.schema))
        except ConfigError as error:
            tell = self.events.warn if own.carry_encoder is True else partial(log, INFO)
            tell(f"The checkpoint carries no encoder, because it is not on this server: {error}")
            return {}


class _Keeper:
    """Keeps what a run has after every round: its history, checkpoints, and what trackers show.

    `strategy`, `live` and `grid` are set before the first round, and `best` if the run ends with its best model.
    """

    strategy: MetaStrategy
    live: trackers.Trackers
    grid: Grid
    best: BestModel | None = None

    def __init__(self, run: _Run, outer: OuterOptimizer, origin: resume.Origin, writer: CheckpointWriter) -> None:
        self._run, self._outer, self._origin, self._writer = run, outer, origin, writer

    def begin(self, grid: Grid) -> None:
        """Before the first round: write a checkpoint, and score the initial model if it may be the best one."""
        every = self._run.config.checkpoint_every
        if self._run.checkpoint is None and every:
            self.save(0)  # so that the run can go on from its first moment
        if self.best and self.best.round is None and not self._run.done:
            self.best.score_initial(grid)
            if every:
                self.save(0)

    def end(self, grid: Grid) -> None:
        """After the last round: find which model the run ends with, and write it as the last checkpoint."""
        again = self.strategy.score_again(grid)
        if (self.best and self.best.decide(grid)) or again:
            self.save(self._run.config.rounds)  # a device adapts this model, as its checkpoint says

    def on_round(self, record: dict[str, Any]) -> None:
        config, number = self._run.config, record["round"]
        self._run.directory.append_round(record)
        self.live.round(record, _clients_of_round(self.strategy, record))
        scored, meta = self.strategy.scored
        if self.best and "validation" in record and scored != config.rounds:
            self.best.take(scored, meta)
        if number == config.rounds or (config.checkpoint_every and number % config.checkpoint_every == 0):
            self.save(number)

    def save(self, number: int) -> None:
        """Write the checkpoint of round `number`."""
        run, strategy = self._run, self.strategy
        last = number == run.config.rounds
        scores, said = resume.score_tensors(strategy.evaluation.last if last else None)
        lr, steps = strategy.chosen_rate()
        said["adapt"] = {"lr": lr, "steps": steps}
        counts = resume.counts(strategy, run.clock.read(), self._origin.resumed)
        if isinstance(self.grid, VirtualGrid):
            counts["so-far"]["virtual-seconds"] = self.grid.clock.now()
        best = self.best.round if self.best else None
        if best is not None:
            counts["so-far"]["best-model"] = best
        tensors, kept = resume.model_tensors(strategy)
        path = self._writer.write(number, tensors | scores, counts | said | kept, last=last, best=best)
        run.events.tell(Saved(number, str(path.relative_to(run.directory.path))))


def _with_devices(grid: Grid, config: RunConfig) -> Grid:
    """Return the grid in virtual time, where the setting `devices` asks for it. Raises ConfigError for real devices."""
    if not config.devices:
        return grid
    if runtime_of(grid) == DEPLOYMENT:
        raise ConfigError('`devices` must be "" on real nodes, which take their own time: simulated devices need a simulation')
    return VirtualGrid(grid)


def _with_privacy(
    config: RunConfig, population: Population, directory: RunDirectory, done: int, warn: Warn
) -> tuple[TaskPrivacy | None, RunConfig]:
    """Return the privacy of a run after so many rounds, and its settings with as many rounds as the budget allows."""
    if not config.privacy.on:
        return None, config
    train = len(population.splits["train"])
    ledger, mean = Ledger(directory.path / LEDGER), centres(config, population)
    per_round = config.tasks_in_round(train)
    privacy = TaskPrivacy(config.privacy, train, per_round, ledger, centres=mean, task_seed=config.seed)
    if privacy.epochs and done % privacy.epochs.length:
        warn(
            "Privacy noise begins a new tree, which costs as much as a new epoch, since the noise of a tree is written nowhere"
        )
    if config.privacy.centre_noise and not mean:
        warn("`privacy.centre-noise` does nothing here: there are no features of an encoder, or `own.scale` is task")
    if config.privacy.noise_seed >= 0:
        warn("Privacy noise is seeded (`privacy.noise-seed`): anybody can subtract it, so this run protects nobody")
    if config.privacy.delta > 1 / train:
        warn(f"Privacy delta is {config.privacy.delta:g}, above 1 / {train} training tasks: it should be well below")
    allowed = privacy.steps_within_budget(config.rounds - done)
    if allowed < config.rounds - done:
        if not done + allowed:
            fewer = "" if privacy.epochs else ", or let fewer tasks in"  # what a tree costs is the same for any number
            raise ConfigError(
                f"`privacy.epsilon` must be at least {privacy.epsilon(privacy.released + 1):.3g} for a single round with these "
                f"settings, got {config.privacy.epsilon:g}: raise it or `privacy.noise-multiplier`{fewer}"
            )
        warn(f"Privacy budget is {config.privacy.epsilon:g}, so training ends after round {done + allowed}")
        config = config.model_copy(update={"rounds": done + allowed})
        if not done:  # a continued run writes its settings once it is certain that it can continue
            directory.write_json("config.json", config.flat())
    return privacy, config


class _Clock:
    """Seconds of this process and its workers from now on, plus those of the earlier parts of the run."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._started = time.monotonic(), _cpu_seconds()
        self._before = {"total": 0.0, "cpu": 0.0}

    def add(self, before: dict[str, float]) -> None:
        self._before = dict(before)

    def read(self) -> dict[str, float]:
        now = {"total": time.monotonic() - self._started[0], "cpu": _cpu_seconds() - self._started[1] + cpu_of(self._grid)}
        return {name: round(value + self._before[name], 3) for name, value in now.items()}


def _clients_of_round(strategy: MetaStrategy, record: dict[str, Any]) -> trackers.Clients:
    """Return what a round reported of single clients: training tasks, and validation tasks if it evaluated."""
    known = record["train"]["tasks"] and strategy.training.client_losses
    found = {"train/loss": np.array(strategy.training.client_losses)} if known else {}
    if "validation" in record:
        found |= clients_of(strategy, "validation", strategy.evaluation.last, *strategy.chosen_rate())
    return found


def _cpu_seconds() -> float:
    """Return the processor seconds of this process and of its finished children, such as a compiler."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
