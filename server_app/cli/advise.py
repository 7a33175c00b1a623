"""`quickbloom advise`: what to deploy for a user's own data."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from quickbloom.common.errors import DataError
from quickbloom.common.printable import one_line
from quickbloom.common.system.terminal import STOPPED, paper, say
from quickbloom.server_app.cli.options import Time
from quickbloom.server_app.runs.directory import to_json, unused


def advise(
    data: Annotated[str, typer.Option(help="Your own file; see docs/own-data.md.")],
    task: Annotated[str | None, typer.Option(help="Its column that says whose row it is.")] = None,
    target: Annotated[str | None, typer.Option(help="Its column to predict.")] = None,
    time_column: Time = None,
    metric: Annotated[
        str | None, typer.Option(help="The score that decides, such as auroc or mae; by default as in `run`.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Training rounds of the candidates that do well.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides the split of the users, and every draw.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of all runs, see `quickbloom settings`; repeat."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory; by default a new one in ./runs.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the advice alone, as JSON, on stdout.")] = False,
) -> None:
    """Say what to deploy for your data, in one page: which algorithm, what a user gains, from how many rows, who loses.

    Tries a few algorithms, models and baselines here, the better ones with more rounds. Validation users decide; other users
    tell what the choice is worth. Fewer than ten users are each held out once. Exit code: 0 there is advice, 1 every run
    failed, 2 wrong input, 130 stopped by Ctrl-C.

    Example: quickbloom advise --data patients.csv --task hospital --target outcome --metric auroc
    """
    from quickbloom.server_app.advising.carry_out import advise_on  # imports torch, which takes seconds

    directory = output.expanduser() if output else unused(Path("runs") / f"advice-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        found = advise_on(
            data, task, target, time_column, directory, metric=metric, rounds=rounds, seed=seed, assignments=set_ or [], say=say
        )
    except KeyboardInterrupt:
        say(f"Stopped, without advice; the runs so far are in {directory}.")
        raise typer.Exit(STOPPED) from None
    if json_:
        print(to_json(found))
    else:
        _show(found)
    _write_page(found, directory)


def _show(found: dict[str, Any]) -> None:
    from quickbloom.server_app.advising.page import lines, table

    paper().print(table(found))
    command = [f"To do it: {found['command']}"] if found["command"] else []
    for line in (*lines(found), *command):
        Console(emoji=False).print(one_line(line), markup=False, highlight=False, soft_wrap=True)


def _write_page(found: dict[str, Any], directory: Path) -> None:
    """Write the page if the extra is installed; advice.json is there either way."""
    from quickbloom.server_app.advising.page import write

    try:
        say(f"Advice: {write(found, directory / 'advice.html')}")
    except DataError as error:
        say(f"Advice: {directory / 'advice.json'}; no page: {error}")
