"""Several algorithms on the same tasks, each with its settings chosen alike: which runs there are, and what is refused.

Tasks and splits depend on the seed alone, so all rows of a seed have the same. Who is chosen stands in `searching`.
"""

import math
import shlex
from dataclasses import dataclass, field, replace
from functools import cached_property

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.parts import own_parts
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets import DATASETS, load_dataset
from quickbloom.common.datasets.base import resolve_data_dir
from quickbloom.common.errors import ConfigError
from quickbloom.common.formatting import counted
from quickbloom.common.system.terminal import say
from quickbloom.server_app.comparing.batch import Setup
from quickbloom.server_app.comparing.fingerprint import Data, Parts, of_run
from quickbloom.server_app.comparing.modes import ASYNC, SYNC, remark, settings_for
from quickbloom.server_app.comparing.variants import ELSEWHERE, Grid, Variant, contenders, points
from quickbloom.server_app.launch.prepare import check_machine, check_simulation, one_for_each_task
from quickbloom.server_app.launch.settings import check_with_data, parse_assignments
from quickbloom.server_app.runs.program import named, program

SHOTS = "test-shots=1,2,5,10"
"""Scored in every run; a run leaves out what its tasks do not have."""

_MOST_SEEDS = 100
_ETA = 3
"""What a rung multiplies the rounds by, and divides the candidates by (Jamieson and Talwalkar 2016, successive halving)."""


@dataclass(frozen=True)
class Plan:
    """What is compared. `inner_lrs`: the rates to choose from; `settings`: texts "key=value" that all runs share.

    `modes`: sync, async or both, in each of which every algorithm has runs; (): the one that is set. `async_rounds`: steps of
    the runs in mode async, None: as many as the others have rounds. `named_rows`: those beside the plain algorithms; `grids`:
    what is searched beside the inner rate, by successive halving.
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

    named_rows: tuple[Variant, ...] = ()
    grids: tuple[Grid, ...] = ()
    data: dict[str, Data] = field(default_factory=dict, compare=False, repr=False)
    """What the runs read, as far as it was looked at: once for each comparison, also for its folds."""

    @cached_property
    def rows(self) -> dict[str, Variant]:
        """Every row by its name: the algorithms, then what is named."""
        return {row.name: row for row in contenders(self.algorithms, self.named_rows)}

    @property
    def variants(self) -> list[tuple[str, str]]:
        """(name of the row, mode) of everything that is compared; mode "" where modes are not."""
        return [(name, mode) for name in self.rows for mode in self.modes or ("",)]

    def first(self) -> Setup:
        """A setup of the first row: what all runs share can be asked of it."""
        return self.candidates(next(iter(self.rows)))[0]

    def candidates(self, name: str, mode: str = "", rounds: int | None = None) -> list[Setup]:
        """One setup per combination of what is searched; a single one if there is nothing to choose.

        `rounds`: those of a rung, None: all.
        """
        row, rates = self.rows[name], f"adapt-lrs={self.adapt_lrs}"
        setups = [
            (point, self._of_data(self._setup(row, *point, rates, mode=mode, rounds=rounds))) for point in self._points(row)
        ]
        if not self.grids:
            return [setup for _, setup in setups]
        rate = f"{row.algorithm}.inner-lr="
        told = {setup: tuple(text for text in point if not text.startswith(rate)) for point, setup in setups}
        return [replace(setup, searched=(*told[setup], f"{setup.rounds} rounds")) for _, setup in setups]

    def _of_data(self, setup: Setup) -> Setup:
        return replace(setup, data=of_run(setup.config(), self.data))

    def rungs(self, name: str, mode: str = "") -> list[tuple[int, int]]:
        """(rounds, candidates) of every step of the search: a third of the candidates goes on with three times the rounds.

        The last has all rounds. Without grids there is one, with all candidates: inner rates alone are tried in full.
        """
        rounds, number = self._rounds(mode), len(self._points(self.rows[name]))
        steps = 0
        while self.grids and number // _ETA ** (steps + 1) and rounds // _ETA ** (steps + 1):
            steps += 1
        found = []
        for step in range(steps, -1, -1):
            found.append((math.ceil(rounds / _ETA**step), number))
            number = math.ceil(number / _ETA)
        return found

    def parts(self) -> Parts:
        """The hashes of everything that the runs read."""
        found = (setup.data for name, mode in self.variants for setup in self.candidates(name, mode))
        return {name: items for data in found if data for name, items in data.parts.items()}

    def searched(self, name: str) -> dict[str, tuple[str, ...]]:
        """The settings of the grids that a row searches, with their values; without the inner rate of `inner_lrs`."""
        row = self.rows[name]
        fixed = row.keys | set(parse_assignments(list(self.settings), row.algorithm))
        keys = {grid.key_for(row.algorithm): grid.values for grid in self.grids}
        return {key: values for key, values in keys.items() if key and key not in fixed}

    @cached_property
    def nodes(self) -> int:
        """Nodes of every run: one for each task where it matters how fast they are, else as few as can be."""
        settings = settings_for(self._any_mode, self.settings)
        setup = Setup(next(iter(self.rows.values())).algorithm, self.dataset, self.rounds, settings)
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
        for row in self.rows.values():
            for point in self._points(row):
                config = self._setup(row, *point).config()
                rates |= {*config.lrs, float(config.flat()[f"{row.algorithm}.inner-lr"])}
        return ",".join(f"{lr!r}" for lr in sorted(rates))

    def _points(self, row: Variant) -> list[tuple[str, ...]]:
        """What each candidate of a row has after `--set`: one empty point where there is nothing to choose."""
        key = f"{row.algorithm}.inner-lr"
        given = key in row.keys or key in parse_assignments(list(self.settings), row.algorithm)
        searched = any(grid.key_for(row.algorithm) == key for grid in self.grids)
        rates: list[tuple[str, ...]] = [(f"{key}={lr!r}",) for lr in self.inner_lrs]
        if given or searched or not ALGORITHMS[row.algorithm].tunes_inner_lr:
            rates = [()]
        return [(*rate, *point) for point in points(self.searched(row.name)) for rate in rates]

    @property
    def _any_mode(self) -> str:
        """A mode that is compared, for what does not depend on which; "": none is."""
        return next(iter(self.modes), "")

    def _rounds(self, mode: str) -> int:
        return self.async_rounds if mode == ASYNC and self.async_rounds else self.rounds

    def _setup(self, row: Variant, *settings: str, mode: str = "", rounds: int | None = None) -> Setup:
        every = (SHOTS, *settings_for(mode or self._any_mode, self.settings), *row.settings, *settings)
        name = "" if row.name == row.algorithm else row.name
        return Setup(row.algorithm, self.dataset, rounds or self._rounds(mode), every, self.nodes, not self.simulation, name)

    def command(self) -> str:
        """What to type to repeat this comparison in its usual directory."""
        seeds = ",".join(map(str, self.seeds)) + "," * (len(self.seeds) == 1)
        words = [
            *program({row.algorithm for row in self.rows.values()} | named({"dataset": self.dataset}, self.settings)),
            "compare",
        ]
        words += ["--algorithms", ",".join(self.algorithms)] if self.algorithms else []
        for row in self.named_rows:
            words += ["--variant", str(row)]
        for grid in self.grids:
            words += ["--grid", str(grid)]
        words += ["--dataset", self.dataset]
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
        rates = {name: len(self._points(row)) for name, row in self.rows.items()}
        what = "combinations" if self.grids else "inner rates"
        parts = [f"{name} ({number} {what})" if number > 1 else name for name, number in rates.items()]
        all_rungs = sum(number for name, mode in self.variants for _, number in self.rungs(name, mode))
        total = all_rungs * len(self.seeds) * max(folds, 1)
        more = f", {counted(folds, 'task')} left out" if folds else ""
        more += f", {' and '.join(self.modes)}" if self.modes else ""
        return f"{counted(total, 'run')}: {', '.join(parts)}; {counted(len(self.seeds), 'seed')} each{more}"

    def check(self, target: float | None = None) -> None:
        """Raise ConfigError or DataError for whatever would end a run: with the data, before anything starts."""
        for row in self.rows.values():
            own = own_parts(parse_run_config({"algorithm": row.algorithm, "dataset": self.dataset}))
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
        self._check_grids()
        for row in self.rows.values():
            self._check_settings(row)
        for name, mode in self.variants:
            for setup in self.candidates(name, mode):
                setup.config()
        if said := remark(self.modes, self.settings):
            say(f"Remark: {said}")
        # Seeds decide the splits, rows the model; reading the data for every pair of them would take long.
        first, *others = self.rows
        for name, seed in [(first, seed) for seed in self.seeds] + [(name, self.seeds[0]) for name in others]:
            self._check_with_data(name, seed, told=(name, seed) == (first, self.seeds[0]))
        self._check_target(target)

    def _check_grids(self) -> None:
        for grid in self.grids:
            if not any(grid.key_for(row.algorithm) for row in self.rows.values()):
                raise ConfigError(f"`--grid {grid}` is of no use: `{grid.key}` is no setting of {', '.join(self.rows)}")
        if self.grids and any(
            "rounds" in parse_assignments([text], row.algorithm) for row in self.rows.values() for text in self.settings
        ):
            raise ConfigError("`rounds` cannot be set with `--set` beside `--grid`, whose first runs are short: use `--rounds`")

    def _check_settings(self, row: Variant) -> None:
        assigned = parse_assignments(list(self.settings), row.algorithm)
        for key, option in ELSEWHERE.items():
            if key in assigned:
                raise ConfigError(f"`{key}` cannot be set with `--set` here: use `{option}`")
        if self.modes and ("mode" in assigned or "mode" in row.keys):
            raise ConfigError("`mode` cannot be set with `--set` beside `--modes`: leave one of them out")
        if "resume-from" in assigned:
            raise ConfigError("`resume-from` cannot be set here: a comparison goes on by itself when it is repeated")
        for key in assigned:
            others = dict.fromkeys(other.algorithm for other in self.rows.values())
            known = [name for name in others if f"{name}.{key}" in parse_assignments([f"{key}=0"], name)]
            if known and row.algorithm not in known:
                raise ConfigError(
                    f"`{key}` is no setting of `{row.algorithm}`: set it for one algorithm alone, as `{known[0]}.{key}`"
                )

    def _check_with_data(self, name: str, seed: int, *, told: bool) -> None:
        config = self.candidates(name)[0].config(seed)
        check_machine(config)
        splits, remarks = check_with_data(config, resolve_data_dir(config.data_dir))
        if told:
            for remark in remarks:
                say(f"Remark: {remark}")
        for split in ("validation", "test") if config.scores_unseen else ():
            if not splits[split]:
                raise ConfigError(f"a comparison needs {split} tasks: set `{split}-tasks` above 0")
        if not splits["validation"] and len(self.candidates(name)) > 1:
            raise ConfigError(
                f"a comparison without validation tasks cannot choose the inner rate of `{name}`, as scores of seen users "
                "must choose nothing: set `validation-tasks` above 0, or give one rate with `--inner-lrs`"
            )

    def _check_target(self, target: float | None) -> None:
        if target is None:
            return
        if not 0 < target < math.inf:
            raise ConfigError(f"`--target-score` must be above 0, got {target:g}")
        config = self.first().config()
        spec = load_dataset(self.dataset, config.table(self.dataset), resolve_data_dir(config.data_dir)).spec
        if spec.kind == "classification" and target > 1:
            raise ConfigError(f"`--target-score` must be an accuracy between 0 and 1, got {target:g}: write 0.75 for 75 %")


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
