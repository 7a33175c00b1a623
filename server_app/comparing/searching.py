"""Who is chosen: every seed tries what there is to choose from, and its own validation tasks decide.

Every seed tries every candidate, and the one with the best final score on that seed's own **validation** tasks wins. Seeds
choose apart because splits depend on the seed: the validation tasks of one are test tasks of another. Test scores are never
looked at here. Of a grid all candidates have a run with few rounds, the best third of them one with three times as many, and so
on up to all rounds: successive halving (Jamieson and Talwalkar 2016), with a factor of three.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from quickbloom.common.errors import ConfigError
from quickbloom.common.metric import metric_of
from quickbloom.common.system import locks
from quickbloom.server_app.comparing.batch import Result, Run, Workers, perform
from quickbloom.server_app.comparing.plan import Plan
from quickbloom.server_app.comparing.watching import Watch, validation_score
from quickbloom.server_app.reporting.progress import progress_bar


@dataclass(frozen=True)
class Entry:
    """One row's part, in one mode. `tried`: the runs with all rounds, by seed; `rungs`: those before, with fewer."""

    algorithm: str
    tried: dict[int, list[Result]]
    mode: str = ""
    name: str = ""
    rungs: dict[int, list[list[Result]]] = field(default_factory=dict)

    @property
    def chosen(self) -> dict[int, Result | None]:
        """The run of every seed that its own validation tasks chose; None where no candidate led to a usable score."""
        return {seed: choose(results) for seed, results in self.tried.items()}

    @property
    def all_tried(self) -> list[Result]:
        """Every run, those of short rungs first, seed by seed."""
        return [one for seed, last in self.tried.items() for rung in (*self.rungs.get(seed, []), last) for one in rung]


@dataclass
class Search:
    """The search of one row, mode and seed: which runs it wants now, by what those before them scored."""

    plan: Plan
    name: str
    mode: str
    seed: int
    root: Path
    done: list[list[Result]] = field(default_factory=list)
    over: bool = False

    def __post_init__(self) -> None:
        self.steps = self.plan.rungs(self.name, self.mode)
        self._left = list(range(self.steps[0][1]))

    @property
    def wanted(self) -> list[Run]:
        """The runs of the rung that is next; [] when the search is over."""
        if self.over:
            return []
        setups = self.plan.candidates(self.name, self.mode, self.steps[len(self.done)][0])
        return [Run(setups[place], self.seed, self.root) for place in self._left]

    def take(self, results: Sequence[Result]) -> None:
        """Go on to the next rung with the best third of these results, which are those of `wanted`."""
        self.done.append(list(results))
        best = ranked(results)
        if len(self.done) == len(self.steps) or not best:
            self.over = True
            return
        places = {id(result): place for result, place in zip(results, self._left, strict=True)}
        keep = best[: self.steps[len(self.done)][1]]
        self._left = sorted(places[id(result)] for result in keep)


def compare(plan: Plan, directory: Path, jobs: int | Workers, console: Console) -> list[Entry]:
    """Do what is not finished of `plan` in `directory`, and return an entry per row."""
    (entries,) = compare_all([plan], directory, jobs, console)
    return entries


def compare_all(plans: Sequence[Plan], directory: Path, jobs: int | Workers, console: Console) -> list[list[Entry]]:
    """Do what is not finished of several plans in one directory, and return their entries."""
    searches = [searches_of(plan, directory) for plan in plans]
    every = [search for of_plan in searches for search in of_plan]
    with progress_bar(console) as progress:
        watch = Watch(console, progress, sum(number for search in every for _, number in search.steps))
        while wanted := {id(search): search.wanted for search in every if not search.over}:
            results = _perform([run for runs in wanted.values() for run in runs], jobs, watch)
            for search in every:
                if id(search) in wanted:
                    search.take([results[run] for run in wanted[id(search)]])
    return [_entries(plan, of_plan) for plan, of_plan in zip(plans, searches, strict=True)]


def searches_of(plan: Plan, directory: Path) -> list[Search]:
    """Return a search for every seed, row and mode, in the order in which runs are started."""
    return [Search(plan, name, mode, seed, directory) for seed in plan.seeds for name, mode in plan.variants]


def _perform(wanted: Sequence[Run], jobs: int | Workers, watch: Watch) -> dict[Run, Result]:
    """The results of runs, each done once: two rows may have the same settings, and then share a directory."""
    places = {run: run.directory for run in wanted}
    first: dict[Path, Run] = {}
    for run, place in places.items():
        first.setdefault(place, run)
    done = perform(list(first.values()), jobs, on_start=watch.on_start, on_end=watch.on_end)
    return {run: done[first[place]] for run, place in places.items()}


def _entries(plan: Plan, searches: Sequence[Search]) -> list[Entry]:
    entries = []
    for name, mode in plan.variants:
        own = [search for search in searches if (search.name, search.mode) == (name, mode)]
        tried = {search.seed: search.done[-1] for search in own}
        rungs = {search.seed: search.done[:-1] for search in own}
        entries.append(Entry(plan.rows[name].algorithm, tried, mode, name, rungs))
    return entries


def choose(results: Sequence[Result]) -> Result | None:
    """The one with the best final validation score; ties go to the lower validation loss, then to the first.

    A single one is chosen whatever became of it. None if none of several has a score.
    """
    return results[0] if len(results) == 1 else next(iter(ranked(results)), None)


def ranked(results: Sequence[Result]) -> list[Result]:
    """Those with a usable score, the best first by the validation tasks; ties as in `choose`."""
    usable = [(scores, result) for result in results if (scores := validation_score(result)) is not None]
    if not usable:
        return []
    metric = metric_of(usable[0][1].summary["validation"])
    ordered = sorted(usable, key=lambda pair: (metric.cost(pair[0][0]), pair[0][1]))
    return [result for _, result in ordered]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One comparison at a time in a directory: another one would take its half-done runs for interrupted ones."""
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.locked(directory / ".lock", create=True))
            if any(locks.is_locked(run) for run in directory.glob(".run-*.lock")):  # of a list whose runs go on here
                raise BlockingIOError
        except BlockingIOError:
            raise ConfigError(
                f"another comparison is at work in '{directory}': wait for it, or choose another `--output`"
            ) from None
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"`--output` must be a directory that can be written, got '{directory}' ({reason})") from None
        yield
