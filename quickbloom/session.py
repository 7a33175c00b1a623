"""For scripts and notebooks: `quickbloom.run`, `quickbloom.compare`, `quickbloom.advise`, `quickbloom.register`."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.algorithms.base import Algorithm
from quickbloom.common.config.key_value import assignment
from quickbloom.common.config.run import Scalar, parse_run_config, spelled_out
from quickbloom.common.datasets import DATASETS
from quickbloom.common.datasets.base import Dataset
from quickbloom.common.errors import ConfigError, RunError
from quickbloom.common.frames import as_file, frame
from quickbloom.common.models import MODELS
from quickbloom.common.models.base import Model
from quickbloom.common.spreadsheets import read_csv
from quickbloom.common.system.processes import cores
from quickbloom.common.system.terminal import STOPPED, say
from quickbloom.common.system.whole_files import replacing
from quickbloom.server_app.events.channel import Listener
from quickbloom.server_app.events.file import read_events
from quickbloom.server_app.events.kinds import RoundEnded, Scored
from quickbloom.server_app.launch.follow import follow, run_here
from quickbloom.server_app.launch.prepare import Start, own_data, settle
from quickbloom.server_app.launch.settings import assigned
from quickbloom.server_app.messaging.runtimes import IN_PROCESS, SIMULATION
from quickbloom.server_app.reporting.result_table import baseline_tables, result_lines, result_table, users_table

Kind = TypeVar("Kind", bound=type[Algorithm] | type[Dataset] | type[Model])
Values = Mapping[str, Any]
"""A table by columns."""


@dataclass(frozen=True)
class Run:
    """A run that is complete. `summary`: the content of summary.json. `directory`: what it left on the disk."""

    summary: dict[str, Any]
    directory: Path

    @cached_property
    def per_task(self) -> Any:
        """The scores of every held-out task: a pandas.DataFrame, or without pandas a NumPy array for each column."""
        with (self.directory / "per_task.csv").open(newline="", encoding="utf-8") as file:
            return _table(
                [
                    {name: cell if name in ("task", "split") else _number(cell) for name, cell in row.items()}
                    for row in read_csv(file)
                ]
            )

    @cached_property
    def history(self) -> Any:
        """One row a round, in the same form; a round without an evaluation has NaN for its scores."""
        events = read_events(self.directory)
        scored = {event.round: event for event in events if isinstance(event, Scored)}
        return _table([_row(event, scored.get(event.round)) for event in events if isinstance(event, RoundEnded)])

    def __repr__(self) -> str:
        return "\n".join([*result_lines(self.summary), f"Run directory: {self.directory}"])

    def _repr_html_(self) -> str:
        """Return the table of results, for a notebook."""
        tables = [result_table(self.summary), users_table(self.summary), *baseline_tables(self.summary)]
        return "".join(_as_html(table) for table in tables if table is not None)


def run(
    algorithm: str | None = None,
    *,
    dataset: str | None = None,
    data: Any = None,
    task: str | None = None,
    target: str | None = None,
    time: str | None = None,
    rounds: int | None = None,
    seed: int | None = None,
    nodes: int | None = None,
    output: str | Path | None = None,
    simulation: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    progress: bool = True,
    listener: Listener | None = None,
    settings: Mapping[str, Scalar] | None = None,
    **options: Scalar,
) -> Run:
    """Train a starting point and test it on held-out tasks, in this process: `quickbloom run` from Python.

    `data`: your own file as for `--data`, a pandas or polars DataFrame, or arrays by column; `task` and `target` name its
    columns, and `time` the one by which each task's rows are cut in order, support first and test last.
    `algorithm`: by default "ridge" for your own data, or "protonet" behind an encoder if labels are each user's own, else
    "reptile".
    `settings`: any settings by name, {"own.shots": 5}; those of the run or the algorithm also as `options`, inner_lr=0.1.
    `simulation`: run in Flower's simulation instead: same result, later. `workers`: how many processes compute the nodes, 1 for
    this one alone; by default one for each core, once rounds are long enough. `ray`: the address of a Ray cluster whose
    machines compute the nodes, "HOST:6379" or "auto". `listener`: is called with every event.
    Raises ConfigError or DataError for wrong input, and RunError for a run that cannot go on.

    Example: `quickbloom.run("maml", data=frame, task="hospital", target="outcome", rounds=50)`

    Example: `quickbloom.run("fedavg", data=frame, target="kind", settings={"partition": "dirichlet:0.1", "users": 20})`
    """
    named: dict[str, Any] = {"algorithm": algorithm, "dataset": dataset, "rounds": rounds, "seed": seed}
    values: dict[str, Scalar] = spelled_out({key: value for key, value in named.items() if value is not None})
    with ExitStack() as stack:
        values |= own_data(stack.enter_context(as_file(data)), task, target, dataset, time)
        values, why = assigned(values, _assignments(settings, options))
        if why and progress:
            say(why)
        if output is not None:
            values["output-dir"] = str(Path(output).expanduser().absolute())
        if ray is not None and (simulation or workers):
            raise ConfigError("`ray` excludes `simulation` and `workers`: the cluster's processors compute the nodes")
        start = settle(values, None, nodes, SIMULATION if simulation else IN_PROCESS, workers)
        listeners = [listener] if listener else []
        summary = _simulated(start) if simulation else _in_process(start, progress, listeners, ray)
        return Run(summary, Path(str(start.settings["output-dir"])))


def compare(
    algorithms: Sequence[str] = (),
    *,
    variants: Mapping[str, Mapping[str, Scalar]] | None = None,
    grids: Mapping[str, Sequence[Scalar]] | None = None,
    dataset: str | None = None,
    data: Any = None,
    task: str | None = None,
    target: str | None = None,
    time: str | None = None,
    seeds: int | Sequence[int] = 3,
    rounds: int | None = None,
    output: str | Path | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    leave_one_out: bool = False,
    modes: Sequence[str] = (),
    merge: Sequence[str | Path] = (),
    settings: Mapping[str, Scalar] | None = None,
    **options: Scalar,
) -> dict[str, Any]:
    """Compare algorithms on the same held-out tasks, and return the content of comparison.json.

    The same as `quickbloom compare`: each run is a process of its own, and what is finished in `output` is kept.
    `seeds`: how many. `variants`: further rows by name, each with its algorithm and settings,
    {"fedrep": {"algorithm": "heads", "head-steps": 5}}. `grids`: values to choose from by validation score, short runs first,
    {"inner-lr": [0.1, 0.3, 1]}. `leave_one_out`: each task of your own data is held out once, and the content of
    leave-one-out.json is returned. `modes`: ["sync", "async"] compares both. `merge`: directories of the same comparison
    elsewhere, whose finished runs are gathered first. `ray`: the address of a Ray cluster whose machines do the runs,
    "HOST:6379" or "auto", in place of `jobs`. `data`: a path, a pandas or polars DataFrame, or arrays by column.
    Raises ConfigError or DataError for wrong input, and RunError if a run fails.

    Example: `quickbloom.compare(["fedavg", "maml"], dataset="digits", rounds=30)`
    """
    from quickbloom.common.system.terminal import console
    from quickbloom.server_app.comparing import comparison, each_left_out
    from quickbloom.server_app.comparing.searching import locked
    from quickbloom.server_app.comparing.spread_out import gather
    from quickbloom.server_app.comparing.variants import variant_of

    with ExitStack() as stack:
        stack.enter_context(_threads_kept())
        in_memory = data is not None and not isinstance(data, str | os.PathLike)
        if in_memory:  # kept beside the runs, which read it, so that the comparison can go on
            place = comparison.place_of("own", output, leave_one_out=leave_one_out)
            stack.enter_context(locked(place))
            data = _kept(stack.enter_context(as_file(data)), place)
        spelled = spelled_out({} if dataset is None else {"dataset": dataset})
        named = spelled.pop("dataset", None)
        plan = comparison.planned(
            algorithms,
            variants=[variant_of(name, values) for name, values in (variants or {}).items()],
            grids=[f"{key.replace('_', '-')}={','.join(map(_plain, values))}" for key, values in (grids or {}).items()],
            dataset=None if named is None else str(named),
            data=None if data is None else str(data),
            task=task,
            target=target,
            time=time,
            seeds=str(seeds) if isinstance(seeds, int) else ",".join(map(str, seeds)) + ",",
            rounds=rounds,
            settings=_assignments({**spelled, **(settings or {})}, options),
            leave_one_out=leave_one_out,
            modes=",".join(modes) or None,
        )
        directory = comparison.place(plan, output, leave_one_out=leave_one_out)
        if not in_memory:
            stack.enter_context(locked(directory))
        gather([Path(place).expanduser() for place in merge], directory)
        at_once: Any = jobs or cores()
        if ray is not None:
            from quickbloom.server_app.ray_cluster.connecting import disconnected_afterwards
            from quickbloom.server_app.ray_cluster.runs import workers

            if jobs is not None:
                raise ConfigError("`ray` excludes `jobs`: the cluster has a processor for each run")
            stack.enter_context(disconnected_afterwards())
            at_once = workers(ray, plan)
        if leave_one_out:
            return each_left_out.carry_out(plan, directory, at_once, console)
        return comparison.carry_out(plan, directory, at_once, console)


def _kept(file: str | None, directory: Path) -> Path:
    """A copy of a table in memory in the directory of its comparison, for this user's eyes alone."""
    source = Path(str(file))
    kept = directory / f"data{source.suffix}"
    with replacing(kept, mode=0o600) as partial:
        shutil.copyfile(source, partial)
    return kept


def advise(
    data: Any,
    *,
    task: str | None = None,
    target: str | None = None,
    time: str | None = None,
    metric: str | None = None,
    rounds: int | None = None,
    seed: int | None = None,
    output: str | Path | None = None,
    settings: Mapping[str, Scalar] | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Try a few algorithms, models and baselines on your data, and return what to deploy: `quickbloom advise` from Python.

    `data`: a path, a pandas or polars DataFrame, or arrays by column. Returns the content of advice.json; "take" is the choice.
    `output`: keeps the runs and advice.json. `say`: is called with a sentence for every step. Raises ConfigError, DataError or
    RunError.

    Example: `quickbloom.advise(frame, task="hospital", target="outcome", metric="auroc")["take"]`
    """
    from quickbloom.server_app.advising.carry_out import advise_on

    if data is None:
        raise ConfigError("`data` must be a path, a DataFrame, or arrays by column, got None: `advise` is for data of your own")
    given: dict[str, Any] = {"metric": metric, "rounds": rounds, "seed": seed, "assignments": _assignments(settings, {})}
    given["lasting"] = isinstance(data, str | os.PathLike)
    with _threads_kept(), as_file(data) as path, tempfile.TemporaryDirectory(prefix="quickbloom-advice-") as folder:
        directory = Path(folder if output is None else output).expanduser()
        return advise_on(str(path), task, target, time, directory, say=say, **given)


def register(kind: Kind) -> Kind:
    """Add an algorithm, a data set or a model of your own under its `name`; also as a decorator. Returns it.

    It is known to this process and its workers, so it is for runs in process: `quickbloom.run`, `quickbloom run`.
    Raises ConfigError for something else, and for a name that is taken.
    """
    registries: list[tuple[type, dict[str, Any]]] = [(Algorithm, ALGORITHMS), (Dataset, DATASETS), (Model, MODELS)]
    for base, registry in registries:
        if isinstance(kind, type) and issubclass(kind, base):
            name = str(getattr(kind, "name", ""))
            if not name or registry.get(name, kind) is not kind:
                raise ConfigError(f"`name` of {kind.__name__} must be one that no other has, got '{name}': choose another")
            registry[name] = kind
            return kind
    raise ConfigError(f"`register` takes a subclass of Algorithm, Dataset or Model, got {kind!r}")


def _in_process(start: Start, progress: bool, listeners: Sequence[Listener], ray: str | None) -> dict[str, Any]:
    """The summary of a run here, or with its nodes on a Ray cluster."""
    config = parse_run_config(start.settings)
    with _threads_kept(), ExitStack() as stack:
        elsewhere = None
        if ray is not None:
            from quickbloom.server_app.ray_cluster.connecting import disconnected_afterwards
            from quickbloom.server_app.ray_cluster.nodes import nodes_on

            stack.enter_context(disconnected_afterwards())
            elsewhere = nodes_on(ray, config)
        how: dict[str, Any] = {"listeners": listeners, "workers": start.workers, "elsewhere": elsewhere}
        return run_here(config, start.nodes, rounds=progress, shown=progress, **how)


@contextmanager
def _threads_kept() -> Iterator[None]:
    """A run computes on one thread; after this context torch has as many as before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _simulated(start: Start) -> dict[str, Any]:
    """The summary of a run in Flower's simulation, which prints what goes on."""
    code, summary = follow(start, False)
    if code == STOPPED:
        raise KeyboardInterrupt
    if summary is None:
        raise RunError("the simulation failed: what was wrong is printed above")
    return summary


def _as_html(table: Table) -> str:
    page = Console(file=StringIO(), record=True, width=120, force_jupyter=False)
    page.print(table)
    return page.export_html(inline_styles=True, code_format='<pre style="line-height: normal">{code}</pre>')


def _assignments(settings: Mapping[str, Scalar] | None, options: Mapping[str, Scalar]) -> list[str]:
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return [assignment(key, value) for key, value in {**(settings or {}), **named}.items()]


def _plain(value: Scalar) -> str:
    """A value as it stands after `--set`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _row(ended: RoundEnded, scored: Scored | None) -> dict[str, Any]:
    row: dict[str, Any] = {"round": ended.round, "loss": _or_nan(ended.loss), "seconds": ended.seconds}
    row |= {"answered": ended.answered, "failures": ended.failures, "up": ended.up, "down": ended.down}
    before, after = (scored.before, scored.after) if scored else (None, None)
    return row | {"validation_before": _or_nan(before), "validation_after": _or_nan(after)}


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _number(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell if cell else float("nan")


def _table(rows: list[dict[str, Any]]) -> Any:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return frame({name: [row.get(name) for row in rows] for name in names})
