"""`quickbloom report`, `settings` and `watch`: what there is to read of runs and of settings."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quickbloom.common.config.parts import table_types
from quickbloom.common.system.terminal import FAILED, STOPPED, paper


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Directory of a run; several are compared.")],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The file to write; by default report.html: of one run in its directory, of several in the current one."
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML file with the results and pictures of a run, also of one that is still going on.

    Several runs are compared in one file; for algorithms with their rates chosen alike, there is `quickbloom compare`.

    Example: quickbloom report runs/digits-maml-seed0-20260101-120000
    """
    from quickbloom.server_app.reporting.report import write_report

    print(write_report(run_dirs, output))


def settings(
    word: Annotated[
        str, typer.Argument(help="A table, such as maml, own or privacy, or a part of a name; by default the run's own.")
    ] = "",
) -> None:
    """List what `--set` takes: names, defaults, values and meanings, as in docs/configuration.md.

    Example: quickbloom settings maml; quickbloom settings inner-lr
    """
    from quickbloom.common.config.write_reference import find

    page = paper()
    for setting in find(word):
        values = ", ".join(setting.choices) or setting.kind
        page.print(f"{setting.key} = {setting.default}", style="bold", markup=False, highlight=False, soft_wrap=True)
        page.print(f"    {setting.meaning}; {values}", markup=False, highlight=False, soft_wrap=True)
    if not word:
        words = (
            f"Tables, of which `quickbloom settings NAME` lists one: {', '.join(table_types())}. With --set, those of the "
            "algorithm's own table go without its name as well: inner-lr=0.1."
        )
        page.print(words, markup=False, highlight=False, soft_wrap=True)


def watch(
    run_dir: Annotated[Path | None, typer.Argument(help="Directory of a run; by default the newest in ./runs.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Say how it stands and end.")] = False,
) -> None:
    """Follow a run that goes on, from its directory alone: rounds, accuracy, nodes, failures, time left.

    Exit code: 0 it came to its end or goes on, 1 it stopped before its end, 2 there is no run, 130 Ctrl-C.

    Example: quickbloom watch runs/digits-maml-seed0-20260101-120000
    """
    from quickbloom.server_app.reporting import watch as watching

    try:
        fine = watching.watch(run_dir or watching.newest(Path("runs")), Console(highlight=False, emoji=False), once=once)
    except KeyboardInterrupt:
        raise typer.Exit(STOPPED) from None
    if not fine:
        raise typer.Exit(FAILED)
