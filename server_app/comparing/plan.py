"""Several algorithms on the same tasks, each with its inner rate chosen alike: which runs there are, and who is chosen.

Every seed tries every inner rate of training, and the rate with the best final score on that seed's own **validation** tasks
wins. Seeds choose apart because splits depend on the seed: the validation tasks of one are test tasks of another. Test scores
are never looked at here. Tasks and splits depend on the seed alone, so all algorithms of a seed have the same.
"""

import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.parts import own_parts
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets import DATASETS, load_dataset
from quickbloom.common.datasets.base import resolve_data_dir
from quickbloom.common.errors import ConfigError, RunError
from quickbloom.common.formatting import counted
from quickbloom.common.metric import LOSS, metric_of
from quickbloom.common.printable import one_line
from quickbloom.common.system import locks
from quickbloom.common.system.terminal import say
from quickbloom.server_app.comparing.batch import Result, Run, Setup, perform
from quickbloom.server_app.comparing.modes import ASYNC, SYNC, remark, settings_for
from quickbloom.server_app.launch.prepare import check_machine, check_simulation, one_for_each_task
from quickbloom.server_app.launch.settings import check_with_data, parse_assignments
from quickbloom.server_app.reporting.progress import progress_bar
from quickbloom.server_app.runs.program import named, program

SHOTS = "test-shots=1,2,5,10"
"""Scored in every run; a run leaves out what its tasks do not have."""

_ELSEWHERE = {"algorithm": "--algorithms", "dataset": "--dataset", "seed": "--seeds", "output-dir": "--output"}
_WRONG_INPUT = 2
_MOST_SEEDS = 100


class CompareError(RunError):
    """A run of the comparison failed. The text says how."""


@dataclass(frozen=True)
class Plan:
    """What is compared. `inner_lrs`: the rates to choose from; `settings`: texts "key=value" that all runs share.

    `modes`: sync, async or both, in each of which every algorithm has runs; (): the one that is set. `async_rounds`: steps of
    the runs in mode async, None: as many as the others have rounds.
    """

    algorithms: tuple[str, ...]
    seeds: tuple[int, ...]
    dataset: str
    rounds: int
    inner_lrs: tuple[float, ...]
    settings: tuple[str, ...] = ()
    simulation: bool = False
    modes: tuple[str, ...] = ()
    async_rounds: int | None = None

    @property
    def variants(self) -> list[tuple[str, str]]:
        """(algorithm, mode) of everything that is compared; mode "" where modes are not."""
        return [(algorithm, mode) for algorithm in self.algorithms for mode in self.modes or ("",)]

    def candidates(self, algorithm: str, mode: str = "") -> list[Setup]:
        """One setup per inner rate; a single one if the rate is given, or is of no use to the algorithm."""
        return [self._setup(algorithm, *rate, f"adapt-lrs={self.adapt_lrs}", mode=mode) for rate in self._rates(algorithm)]

    @cached_property
    def nodes(self) -> int:
        """Nodes of every run: one for each task where it matters how fast they are, else as few as can be."""
        setup = Setup(self.algorithms[0], self.dataset, self.rounds, self.settings)
        config = setup.config()
        if self.modes or config.devices:
            return one_for_each_task(config)
        return 2 if self.simulation else 1

    @cached_property
    def adapt_lrs(self) -> str:
        """The rates of adaptation, the same for all runs: those that are set, and every inner rate that a run can have.

        A run would add its own inner rate by itself, which the others then would not have.
        """
        rates = set(self.inner_lrs)
        for algorithm in self.algorithms:
            for rate in self._rates(algorithm):
                config = self._setup(algorithm, *rate).config()
                rates |= {*config.lrs, float(config.flat()[f"{algorithm}.inner-lr"])}
        return ",".join(f"{lr!r}" for lr in sorted(rates))

    def _rates(self, algorithm: str) -> list[tuple[str, ...]]:
        """What each candidate has after `--set` for its inner rate: nothing where there is nothing to choose."""
        given = f"{algorithm}.inner-lr" in parse_assignments(list(self.settings), algorithm)
        if given or not ALGORITHMS[algorithm].tunes_inner_lr:
            return [()]
        return [(f"{algorithm}.inner-lr={lr!r}",) for lr in self.inner_lrs]

    def _setup(self, algorithm: str, *settings: str, mode: str = "") -> Setup:
        every = (SHOTS, *settings_for(mode, self.settings), *settings)
        rounds = self.async_rounds if mode == ASYNC and self.async_rounds else self.rounds
        return Setup(algorithm, self.dataset, rounds, every, self.nodes, not self.simulation)

    def command(self) -> str:
        """What to type to repeat this comparison in its usual directory."""
        seeds = ",".join(map(str, self.seeds)) + "," * (len(self.seeds) == 1)
        words = [
            *program({*self.algorithms, *named({"dataset": self.dataset}, self.settings)}),
            "compare",
            "--algorithms",
            ",".join(self.algorithms),
            "--dataset",
            self.dataset,
        ]
        words += ["--seeds", seeds, "--rounds", str(self.rounds), "--inner-lrs", ",".join(f"{lr!r}" for lr in self.inner_lrs)]
        words += ["--modes", ",".join(self.modes)] if self.modes else []
        words += ["--async-rounds", str(self.async_rounds)] if self.async_rounds else []
        for text in self.settings:
            words += ["--set", text]
        return shlex.join(words + ["--simulation"] * self.simulation)

    def describe(self, folds: int = 0) -> str:
        """How many runs there are, before any is started: "8 runs: fedavg (3 inner rates), protonet; 2 seeds each".

        `folds`: tasks that are left out, each in a run of its own; 0: none.
        """
        rates = {name: len(self.candidates(name)) for name in self.algorithms}
        parts = [f"{name} ({number} inner rates)" if number > 1 else name for name, number in rates.items()]
        total = sum(rates.values()) * len(self.seeds) * max(folds, 1) * max(len(self.modes), 1)
        more = f", {counted(folds, 'task')} left out" if folds else ""
        more += f", {' and '.join(self.modes)}" if self.modes else ""
        return f"{counted(total, 'run')}: {', '.join(parts)}; {counted(len(self.seeds), 'seed')} each{more}"

    def check(self, target: float | None = None) -> None:
        """Raise ConfigError or DataError for whatever would end a run: with the data, before anything starts."""
        for name in self.algorithms:
            own = own_parts(parse_run_config({"algorithm": name, "dataset": self.dataset}))
            if self.simulation and "algorithm" in own:
                raise ConfigError(
                    "`--simulation` needs algorithms of this project: Flower's processes do not know your own one"
                )
            if self.simulation and own:
                raise ConfigError(
                    "`--simulation` needs a data set of this project: Flower's processes do not know your own one"
                )
        if self.simulation:
            check_simulation(", or leave `--simulation` out")
        for algorithm in self.algorithms:
            self._check_settings(algorithm)
        for algorithm, mode in self.variants:
            for setup in self.candidates(algorithm, mode):
                setup.config()
        if said := remark(self.modes, self.settings):
            say(f"Remark: {said}")
        # Seeds decide the splits, algorithms the model; reading the data for every pair of them would take long.
        pairs = [(self.algorithms[0], seed) for seed in self.seeds] + [(name, self.seeds[0]) for name in self.algorithms[1:]]
        for algorithm, seed in pairs:
            self._check_with_data(algorithm, seed)
        self._check_target(target)

    def _check_settings(self, algorithm: str) -> None:
        assigned = parse_assignments(list(self.settings), algorithm)
        for key, option in _ELSEWHERE.items():
            if key in assigned:
                raise ConfigError(f"`{key}` cannot be set with `--set` here: use `{option}`")
        if self.modes and "mode" in assigned:
            raise ConfigError("`mode` cannot be set with `--set` beside `--modes`: leave one of them out")
        if "resume-from" in assigned:
            raise ConfigError("`resume-from` cannot be set here: a comparison goes on by itself when it is repeated")
        for key in assigned:
            known = [name for name in self.algorithms if f"{name}.{key}" in parse_assignments([f"{key}=0"], name)]
            if known and algorithm not in known:
                raise ConfigError(
                    f"`{key}` is no setting of `{algorithm}`: set it for one algorithm alone, as `{known[0]}.{key}`"
                )

    def _check_with_data(self, algorithm: str, seed: int) -> None:
        config = self.candidates(algorithm)[0].config(seed)
        check_machine(config)
        splits, remarks = check_with_data(config, resolve_data_dir(config.data_dir))
        if (algorithm, seed) == (self.algorithms[0], self.seeds[0]):
            for remark in remarks:
                say(f"Remark: {remark}")
        for split in ("validation", "test") if config.scores_unseen else ():
            if not splits[split]:
                raise ConfigError(f"a comparison needs {split} tasks: set `{split}-tasks` above 0")
        if not splits["validation"] and len(self.candidates(algorithm)) > 1:
            raise ConfigError(
                f"a comparison without validation tasks cannot choose the inner rate of `{algorithm}`, as scores of seen users "
                "must choose nothing: set `validation-tasks` above 0, or give one rate with `--inner-lrs`"
            )

    def _check_target(self, target: float | None) -> None:
        if target is None:
            return
        if not 0 < target < math.inf:
            raise ConfigError(f"`--target-score` must be above 0, got {target:g}")
        config = self.candidates(self.algorithms[0])[0].config()
        spec = load_dataset(self.dataset, config.table(self.dataset), resolve_data_dir(config.data_dir)).spec
        if spec.kind == "classification" and target > 1:
            raise ConfigError(f"`--target-score` must be an accuracy between 0 and 1, got {target:g}: write 0.75 for 75 %")


@dataclass(frozen=True)
class Entry:
    """One algorithm's part, in one mode. `tried`: the runs with every inner rate, by seed."""

    algorithm: str
    tried: dict[int, list[Result]]
    mode: str = ""

    @property
    def chosen(self) -> dict[int, Result | None]:
        """The run of every seed that its own validation tasks chose; None where no rate led to a usable score."""
        return {seed: choose(results) for seed, results in self.tried.items()}


def compare(plan: Plan, directory: Path, jobs: int, console: Console) -> list[Entry]:
    """Do what is not finished of `plan` in `directory`, and return an entry per algorithm."""
    (entries,) = compare_all([plan], directory, jobs, console)
    return entries


def compare_all(plans: Sequence[Plan], directory: Path, jobs: int, console: Console) -> list[list[Entry]]:
    """Do what is not finished of several plans in one directory, and return their entries."""
    candidates = [{variant: plan.candidates(*variant) for variant in plan.variants} for plan in plans]

    def runs(at: int, variant: tuple[str, str], seed: int) -> list[Run]:
        return [Run(setup, seed, directory) for setup in candidates[at][variant]]

    listed = list(enumerate(plans))
    wanted = [run for at, plan in listed for seed in plan.seeds for variant in plan.variants for run in runs(at, variant, seed)]
    with progress_bar(console) as progress:
        watch = _Watch(console, progress, len(wanted))
        results = perform(wanted, jobs, on_start=watch.on_start, on_end=watch.on_end)
    return [
        [
            Entry(name, {seed: [results[run] for run in runs(at, (name, mode), seed)] for seed in plan.seeds}, mode)
            for name, mode in plan.variants
        ]
        for at, plan in listed
    ]


def choose(results: Sequence[Result]) -> Result | None:
    """The one with the best final validation score; ties go to the lower validation loss, then to the first.

    A single one is chosen whatever became of it. None if none of several has a score.
    """
    if len(results) == 1:
        return results[0]
    usable = [(scores, result) for result in results if (scores := validation_score(result)) is not None]
    if not usable:
        return None
    metric = metric_of(usable[0][1].summary["validation"])
    return min(usable, key=lambda pair: (metric.cost(pair[0][0]), pair[0][1]))[1]


def validation_score(result: Result) -> tuple[float, float] | None:
    """(accuracy or mse, loss) on the validation tasks, adapted as the run chose; None if it failed or is not finite."""
    if result.code or not result.summary["validation"]:
        return None
    summary = result.summary
    step, scores = summary["chosen"]["adapt_steps"], summary["validation"]
    score, loss = (scores[metric.name]["mean"][step] for metric in (metric_of(scores), LOSS))
    return None if score is None else (score, math.inf if loss is None else loss)


def recommended_rates(dataset: str) -> tuple[float, ...]:
    """A third of the data set's inner rate, the rate, and three times it, rounded to one digit: 0.3 -> 0.1, 0.3, 0.9."""
    if dataset not in DATASETS:
        parse_run_config({"dataset": dataset})  # says what is wrong with it
    return tuple(float(f"{DATASETS[dataset].inner_lr * factor:.0e}") for factor in (1 / 3, 1, 3))


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds 0, 1, 2 from "3", and those that are listed from "0,1,5"; a single one has a comma behind it: "5,"."""
    try:
        listed = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        listed = [-1]
    if min(listed) < 0 or ("," not in text and listed == [0]):
        raise ConfigError(f"`--seeds` must be how many seeds, or the seeds with commas between them (0,1,5), got '{text}'")
    if "," in text:
        return tuple(dict.fromkeys(listed))
    if listed[0] > _MOST_SEEDS:
        number = listed[0]
        raise ConfigError(
            f"`--seeds` must be at most {_MOST_SEEDS} seeds, got {number}: for seed {number} alone write '{number},'"
        )
    return tuple(range(listed[0]))


def parse_modes(text: str) -> tuple[str, ...]:
    """Modes from "sync,async". Raises ConfigError for others."""
    modes = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(modes) <= {SYNC, ASYNC}:
        raise ConfigError(f"`--modes` must be sync, async, or both with a comma between them, got '{text}'")
    return modes


def parse_rates(text: str) -> tuple[float, ...]:
    """Positive numbers from "0.03,0.1"."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(0 < rate < math.inf for rate in rates):
        raise ConfigError(f"`--inner-lrs` must be positive numbers with commas between them, got '{text}'")
    return tuple(dict.fromkeys(rates))


def describe(run: Run) -> str:
    """A run in a few words: "maml, async, inner lr 0.3, seed 0", and "without A" if it leaves a task out."""
    settings = run.setup.effective()
    rate, left, mode = inner_lr(run.setup), settings.get("own.leave-out"), f", {ASYNC}" * (settings["mode"] == ASYNC)
    said = f"{run.setup.algorithm}{mode}, {f'inner lr {rate:g}, ' if rate is not None else ''}seed {run.seed}"
    return f"{said}, without {left}" if left else said


def inner_lr(setup: Setup) -> float | None:
    """The inner rate of training; None where it is of no use."""
    if not ALGORITHMS[setup.algorithm].tunes_inner_lr:
        return None
    return float(setup.effective()[f"{setup.algorithm}.inner-lr"])


class _Watch:
    """Tells which runs go on and what came of each; ends everything for what is neither a result nor a divergence."""

    def __init__(self, console: Console, progress: Progress, total: int) -> None:
        self._console, self._progress, self._total = console, progress, total
        self._task: TaskID = progress.add_task("", total=total)
        self._number = 0
        self._running: list[str] = []
        self._warned: set[str] = set()

    def on_start(self, run: Run) -> None:
        self._running.append(describe(run))
        self._show()

    def on_end(self, result: Result, kept: bool) -> None:
        name = describe(result.run)
        if not kept:
            self._running.remove(name)
        self._number += 1
        if result.code == _WRONG_INPUT:
            raise ConfigError(result.failure)
        if result.broken:
            command = " ".join(result.run.setup.command(result.run.seed))
            raise CompareError(f"`{command}` ended with code {result.code}: {result.failure[-600:]}")
        self._tell_warnings(result, name)
        took = "kept" if kept else f"{result.facts['wall']:.0f} s"
        self._console.print(f"[{self._number}/{self._total}] {name}: {_outcome(result)}, {took}", markup=False, soft_wrap=True)
        self._show()

    def _tell_warnings(self, result: Result, name: str) -> None:
        """Those that no run before had: most are of the data, which all runs share."""
        for sentence in result.warnings:
            if sentence not in self._warned:
                self._warned.add(sentence)
                self._console.print(one_line(f"{name}: {sentence}"), markup=False, style="yellow", soft_wrap=True)

    def _show(self) -> None:
        self._progress.update(self._task, completed=self._number, description="; ".join(self._running))


def _outcome(result: Result) -> str:
    scores = validation_score(result)
    if scores is None and not result.code and not result.summary["validation"]:
        return "done, without validation tasks"
    if scores is None:
        return f"failed: {result.failure}" if result.code else "diverged"
    metric = metric_of(result.summary["validation"])
    return f"validation {metric.title} {metric.score(scores[0])}"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One comparison at a time in a directory: another one would take its half-done runs for interrupted ones."""
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.locked(directory / ".lock", create=True))
        except BlockingIOError:
            raise ConfigError(
                f"another comparison is at work in '{directory}': wait for it, or choose another `--output`"
            ) from None
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"`--output` must be a directory that can be written, got '{directory}' ({reason})") from None
        yield
