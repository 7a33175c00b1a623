"""`quickbloom compare`: several algorithms on the same tasks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from quickbloom.common.config.key_value import assignment
from quickbloom.common.config.run import RunConfig, spelled_out
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.formatting import counted
from quickbloom.common.system.processes import cores
from quickbloom.common.system.terminal import FAILED, STOPPED, console, paper, say, say_error
from quickbloom.server_app.cli import compare_options as options
from quickbloom.server_app.cli.options import Partition, Time, Users
from quickbloom.server_app.runs.directory import to_json

if TYPE_CHECKING:
    from quickbloom.server_app.comparing.batch import Workers
    from quickbloom.server_app.comparing.plan import Plan

_DEFAULT = RunConfig()


def compare(
    algorithms: options.Algorithms = "",
    variant: options.Variants = None,
    grid: options.Grids = None,
    dataset: options.Dataset = _DEFAULT.dataset,
    data: options.Data = None,
    task: options.Task = None,
    target: options.Target = None,
    time_column: Time = None,
    partition: Partition = None,
    users: Users = None,
    seeds: options.Seeds = "3",
    rounds: options.Rounds = _DEFAULT.rounds,
    inner_lrs: options.InnerLrs = None,
    target_score: options.TargetScore = None,
    leave_one_out: options.LeaveOneOut = False,
    modes: options.Modes = None,
    async_rounds: options.AsyncRounds = None,
    devices: options.Devices = None,
    set_: options.Settings = None,
    jobs: options.Jobs = None,
    simulation: options.Simulation = False,
    plan_file: options.PlanFile = None,
    one_run: options.OneRun = None,
    merge: options.Merge = None,
    ray: options.Ray = None,
    output: options.Output = None,
    json_: options.Json = False,
) -> None:
    """Compare algorithms on the same held-out tasks, with rates chosen on validation tasks for all alike.

    Every run is `quickbloom run` in a process of its own. Repeat the command to go on: runs that are finished in the directory
    are kept. Exit code: 0 there is a result, 1 every run failed, 2 wrong input, 130 stopped by Ctrl-C.

    Example: quickbloom compare --algorithms fedavg,reptile,maml,protonet --dataset digits --seeds 3

    Example: quickbloom compare --variant fedper:heads.head-steps=0 --variant fedrep:heads,heads.head-steps=5 --dataset digits

    Example: quickbloom compare --algorithms heads,maml --grid heads.head-steps=0,1,5 --grid inner-lr=0.1,0.3,1

    Example: quickbloom compare --algorithms reptile,protonet --dataset digits --modes sync,async --devices lognormal

    Example: quickbloom compare --plan runs.jsonl --run 7

    Example: quickbloom compare --algorithms fedavg,maml,heads --seeds 10 --ray HOST:6379
    """
    from quickbloom.server_app.comparing import comparison

    if one_run is not None:
        _one_of_the_list(plan_file, one_run, output)
        return
    spelled = spelled_out({"dataset": dataset})
    dataset = str(spelled.pop("dataset"))
    spelled |= {key: value for key, value in {"partition": partition, "users": users}.items() if value is not None}
    plan = comparison.planned(
        [name for part in algorithms.split(",") if (name := part.strip())],
        variants=variant or [],
        grids=grid or [],
        dataset=None if dataset == _DEFAULT.dataset else dataset,
        data=data,
        task=task,
        target=target,
        time=time_column,
        seeds=seeds,
        rounds=rounds,
        inner_lrs=inner_lrs,
        settings=[*(assignment(key, value) for key, value in spelled.items()), *(set_ or [])],
        simulation=simulation,
        target_score=target_score,
        leave_one_out=leave_one_out,
        modes=modes,
        devices=devices,
        async_rounds=async_rounds,
    )
    directory = comparison.place(plan, output, leave_one_out=leave_one_out)
    _gather(merge or [], directory)
    at_once = _at_once(plan, jobs, ray, simulation=simulation, listed=plan_file is not None)
    if plan_file is not None:
        _list(plan, directory, plan_file, leave_one_out=leave_one_out)
    elif leave_one_out:
        _each_left_out(plan, directory, at_once, json_)
    else:
        _compare(plan, directory, at_once, target_score, json_)


def _at_once(plan: "Plan", jobs: int | None, ray: str | None, *, simulation: bool, listed: bool) -> "int | Workers":
    """Return how many runs are done at once here, or what does them on a Ray cluster. Raises ConfigError."""
    if ray is None:
        return jobs or (1 if simulation else cores())
    if excluded := [name for name, given in (("--jobs", jobs), ("--simulation", simulation), ("--plan", listed)) if given]:
        raise ConfigError(f"`--ray` excludes `{excluded[0]}`: the cluster has a processor for each run")
    from quickbloom.server_app.ray_cluster.runs import workers

    return workers(ray, plan)


def _one_of_the_list(file: Path | None, number: int, output: Path | None) -> None:
    """Do one run of a list."""
    from quickbloom.server_app.comparing import spread_out

    if file is None:
        raise ConfigError("`--run` is the number of a run in a list: name the list with `--plan`")
    run = spread_out.read_run(file, number, output)
    with _told(run.root):
        result = spread_out.do(run)
    if result.code:
        say_error(result.failure)
        raise typer.Exit(result.code if result.code > 0 else FAILED)
    say(f"Run {number}: {run.directory}")


def _gather(places: list[Path], directory: Path) -> None:
    if not places:
        return
    from quickbloom.server_app.comparing.searching import locked
    from quickbloom.server_app.comparing.spread_out import gather

    with locked(directory):
        say(f"Gathered: {counted(gather(places, directory), 'new run')} in {directory}")


def _list(plan: "Plan", directory: Path, file: Path, *, leave_one_out: bool) -> None:
    from quickbloom.server_app.comparing.comparison import listed

    number = listed(plan, directory, file, leave_one_out=leave_one_out)
    if not number:
        say(f"Nothing is left to do: repeat the command without `--plan` for the table, in {directory}")
        return
    say(f"{counted(number, 'run')} in {file}: `quickbloom compare --plan {file} --run K` does one, K from 1 to {number}")


def _compare(plan: "Plan", directory: Path, jobs: "int | Workers", target_score: float | None, as_json: bool) -> None:
    """Runs, table and page."""
    from quickbloom.server_app.comparing import comparison
    from quickbloom.server_app.comparing.searching import locked

    with locked(directory):
        say(plan.describe())
        with _told(directory):
            result = comparison.carry_out(plan, directory, jobs, console, target_score)
        _write_comparison_page(result, directory)
    _show(result, as_json)
    if all(row["failed"] == len(row["runs"]) for row in result["algorithms"]):
        raise typer.Exit(FAILED)


def _each_left_out(plan: "Plan", directory: Path, jobs: "int | Workers", as_json: bool) -> None:
    """The same with every task left out once, and a table over tasks."""
    from quickbloom.server_app.comparing import each_left_out
    from quickbloom.server_app.comparing.searching import locked

    with locked(directory), _told(directory):
        say(plan.describe(len(each_left_out.folds(plan))))
        result = each_left_out.carry_out(plan, directory, jobs, console)
    if as_json:
        print(to_json(result))
    else:
        paper().print(each_left_out.rich_table(result))
        for line in (*each_left_out.caption(result), *each_left_out.failures(result)):
            Console(emoji=False).print(line, markup=False, highlight=False, soft_wrap=True)
        say(f"Directory: {directory}")
    if all(row["failed"] == len(row["folds"]) for row in result["algorithms"]):
        raise typer.Exit(FAILED)


@contextmanager
def _told(directory: Path) -> Iterator[None]:
    """Say how it ended, and end the command, where it is stopped or a run breaks."""
    from quickbloom.server_app.comparing.watching import CompareError

    try:
        yield
    except KeyboardInterrupt:
        say(f"Stopped; repeat the command to go on: {directory} keeps what is finished.")
        raise typer.Exit(STOPPED) from None
    except CompareError as error:
        say_error(str(error))
        raise typer.Exit(FAILED) from None


def _show(result: dict[str, Any], as_json: bool) -> None:
    from quickbloom.server_app.comparing.table import caption, failures, rich_table, rich_tables_below

    if as_json:
        print(to_json(result))
        return
    paper().print(rich_table(result))
    for below in rich_tables_below(result):
        paper().print(below)
    for line in (*caption(result), *failures(result)):
        Console(emoji=False).print(line, markup=False, highlight=False, soft_wrap=True)


def _write_comparison_page(result: dict[str, Any], directory: Path) -> None:
    """The page if the extra is installed; the other files are there either way."""
    from quickbloom.server_app.comparing.page import write_comparison_page

    try:
        page = write_comparison_page(result, directory / "comparison.html")
        say(f"Comparison: {page}")
    except DataError as error:
        say(f"Comparison: {directory / 'comparison.md'}; no plots: {error}")
