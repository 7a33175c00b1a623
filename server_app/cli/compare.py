"""`quickbloom compare`: several algorithms on the same tasks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.key_value import assignment
from quickbloom.common.config.run import RunConfig, spelled_out
from quickbloom.common.errors import DataError
from quickbloom.common.system.processes import cores
from quickbloom.common.system.terminal import FAILED, STOPPED, console, paper, say, say_error
from quickbloom.server_app.cli.options import DATASETS, Partition, Time, Users
from quickbloom.server_app.runs.directory import to_json

if TYPE_CHECKING:
    from quickbloom.server_app.comparing.plan import Plan

_DEFAULT = RunConfig()


def compare(
    algorithms: Annotated[str, typer.Option(help=f"With commas between them: {', '.join(ALGORITHMS)}.")],
    dataset: Annotated[str, typer.Option(help=f"Whose tasks: {DATASETS}.")] = _DEFAULT.dataset,
    data: Annotated[str | None, typer.Option(help="Your own file; see docs/own-data.md.")] = None,
    task: Annotated[str | None, typer.Option(help="Its column that says whose row it is.")] = None,
    target: Annotated[str | None, typer.Option(help="Its column to predict.")] = None,
    time_column: Time = None,
    partition: Partition = None,
    users: Users = None,
    seeds: Annotated[str, typer.Option(help="How many (3: seeds 0, 1, 2), or which (0,1,5).")] = "3",
    rounds: Annotated[int, typer.Option(help="Training rounds.")] = _DEFAULT.rounds,
    inner_lrs: Annotated[
        str | None, typer.Option(help="Inner rates of training to choose from; by default the data set's, / 3 and x 3.")
    ] = None,
    target_score: Annotated[
        float | None,
        typer.Option(
            help="Validation accuracy (0..1) or mse to count rounds to; by default fedavg's last, else the weakest's."
        ),
    ] = None,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Few tasks: hold each out once, in a run for each algorithm, seed and rate.")
    ] = False,
    modes: Annotated[
        str | None,
        typer.Option(help="sync,async: every algorithm in both, the time to sync's score and bytes; a node for each task."),
    ] = None,
    async_rounds: Annotated[
        int | None, typer.Option(help="Steps of the async runs, which are short; by default as many as --rounds.", min=1)
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(help="Simulated devices in virtual time: even, lognormal, or a CSV file (docs/configuration.md)."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of all runs, see `quickbloom settings`; repeat."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at once; by default one per core, 1 with --simulation.", min=1)] = None,
    simulation: Annotated[bool, typer.Option("--simulation", help="Run in Flower's simulation: same result, later.")] = False,
    output: Annotated[Path | None, typer.Option(help="Directory; by default runs/compare-DATASET.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result alone, as JSON, on stdout.")] = False,
) -> None:
    """Compare algorithms on the same held-out tasks, with rates chosen on validation tasks for all alike.

    Every run is `quickbloom run` in a process of its own. Repeat the command to go on: runs that are finished in the directory
    are kept. Exit code: 0 there is a result, 1 every run failed, 2 wrong input, 130 stopped by Ctrl-C.

    Example: quickbloom compare --algorithms fedavg,reptile,maml,protonet --dataset digits --seeds 3

    Example: quickbloom compare --algorithms reptile,protonet --dataset digits --modes sync,async --devices lognormal
    """
    from quickbloom.server_app.comparing import comparison
    from quickbloom.server_app.comparing.plan import locked

    spelled = spelled_out({"dataset": dataset})
    dataset = str(spelled.pop("dataset"))
    spelled |= {key: value for key, value in {"partition": partition, "users": users}.items() if value is not None}
    plan = comparison.planned(
        list(dict.fromkeys(name.strip() for name in algorithms.split(","))),
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
    if leave_one_out:
        _each_left_out(plan, directory, jobs or cores(), json_)
        return
    with locked(directory):
        say(plan.describe())
        with _told(directory):
            result = comparison.carry_out(plan, directory, jobs or (1 if simulation else cores()), console, target_score)
        _write_comparison_page(result, directory)
    _show(result, json_)
    if all(row["failed"] == len(row["runs"]) for row in result["algorithms"]):
        raise typer.Exit(FAILED)


def _each_left_out(plan: "Plan", directory: Path, jobs: int, as_json: bool) -> None:
    """The same with every task left out once, and a table over tasks."""
    from quickbloom.server_app.comparing import each_left_out
    from quickbloom.server_app.comparing.plan import locked

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
    from quickbloom.server_app.comparing.plan import CompareError

    try:
        yield
    except KeyboardInterrupt:
        say(f"Stopped; repeat the command to go on: {directory} keeps what is finished.")
        raise typer.Exit(STOPPED) from None
    except CompareError as error:
        say_error(str(error))
        raise typer.Exit(FAILED) from None


def _show(result: dict[str, Any], as_json: bool) -> None:
    from quickbloom.server_app.comparing.result import caption, failures, rich_table, rich_table_of_modes

    if as_json:
        print(to_json(result))
        return
    paper().print(rich_table(result))
    if result["modes"]:
        paper().print(rich_table_of_modes(result))
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
