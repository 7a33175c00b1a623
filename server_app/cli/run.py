"""`quickbloom run`: one run, or one for each task that it leaves out."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.run import Scalar, parse_run_config, spelled_out
from quickbloom.common.errors import ConfigError, QuickbloomError
from quickbloom.common.flower import message_assembly
from quickbloom.common.system import logs
from quickbloom.common.system.terminal import paper, say
from quickbloom.server_app.cli.options import DATASETS, Encoder, Partition, TextColumns, Time, Users
from quickbloom.server_app.launch.follow import follow
from quickbloom.server_app.launch.prepare import Start, connection_for, own_data, runtime_for, settle
from quickbloom.server_app.launch.settings import assigned, default_algorithm, parse_assignments
from quickbloom.server_app.messaging.runtimes import IN_PROCESS, SIMULATION
from quickbloom.server_app.reporting.result_table import baseline_tables, few_tasks, result_table, users_table
from quickbloom.server_app.runs.directory import to_json, unused

if TYPE_CHECKING:
    from quickbloom.server_app.messaging.in_process_grid import Elsewhere


def run(
    algorithm: Annotated[
        str | None,
        typer.Option(
            help=f"What to train: {', '.join(ALGORITHMS)}; by default ridge for own data, or protonet behind an encoder if "
            "labels are each user's own, else reptile."
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help=f"Whose tasks: {DATASETS}.")] = None,
    data: Annotated[str | None, typer.Option(help="Your own file; see docs/own-data.md.")] = None,
    task: Annotated[str | None, typer.Option(help="Its column that says whose row it is.")] = None,
    target: Annotated[str | None, typer.Option(help="Its column to predict.")] = None,
    time_column: Time = None,
    encoder: Encoder = None,
    text: TextColumns = None,
    partition: Partition = None,
    users: Users = None,
    rounds: Annotated[int | None, typer.Option(help="Training rounds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides the initial model, the task split and every draw.")] = None,
    nodes: Annotated[
        int | None,
        typer.Option(help="Simulated nodes; by default 2, or with `devices` one a task.", min=1),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, see `quickbloom settings`; repeat."),
    ] = None,
    connection: Annotated[
        str | None,
        typer.Option(help="A SuperLink connection of Flower's config.toml; by default $QUICKBLOOM_CONNECTION, if set."),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Without `--connection`: in-process, the default, or simulation, which is Flower's; the same result."
        ),
    ] = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="The same as `--runtime in-process`.", hidden=True)] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that compute the nodes in process; by default one for each core, once rounds are long enough.",
            min=1,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Compute the nodes on a Ray cluster that is running: HOST:PORT, or auto."),
    ] = None,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Few tasks: hold each out once, one run for each; in this process.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Directory of the run; by default a new one in ./runs.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Go on with a run that was cut off; its settings are taken over.")
    ] = None,
    trust: Annotated[
        str,
        typer.Option("--trust-model", metavar="MODULE:FACTORY", help="With --resume: own code that its checkpoint may name."),
    ] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print the summary alone, as JSON, on stdout.")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.html.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Flower's whole log.")] = False,
    log_format: logs.FormatOption = logs.Format.TEXT,
    log_file: logs.FileOption = None,
    log_size: logs.SizeOption = 10.0,
) -> None:
    """Train a starting point and test it on held-out tasks.

    Exit code: 0 the run completed, 1 it failed, 2 wrong input, 130 stopped by Ctrl-C.

    Example: quickbloom run --algorithm maml --dataset digits --rounds 100 --set maml.inner-lr=0.3

    Example: quickbloom run --dataset fashion-mnist --partition dirichlet:0.1 --users 100 --algorithm fedavg

    Example: quickbloom run --resume runs/digits-maml-seed0-20260101-120000

    Example: quickbloom run --dataset shakespeare --nodes 16 --ray HOST:6379

    Example: quickbloom run --connection ours --log-format json --log-file run.log
    """
    logs.begin(logs.Settings(log_format, log_file, log_size))
    named: dict[str, Scalar | None] = {"algorithm": algorithm, "dataset": dataset, "rounds": rounds, "seed": seed}
    named |= {"partition": partition, "users": users}
    settings = spelled_out({key: value for key, value in named.items() if value is not None})
    settings |= own_data(data, task, target, dataset, time_column, encoder, text)
    if ray is not None:
        runtime = _of_ray(connection, runtime, workers, leave_one_out=leave_one_out)
    runtime = runtime_for(runtime, in_process)
    connection = connection_for(connection, runtime, nodes)
    given = settings | parse_assignments(set_ or [], default_algorithm(settings))
    if resume is None and "resume-from" not in given:
        given, why = assigned(settings, set_ or [], here=connection is None)
        if why:
            say(why)
    settings = given
    if connection is None and runtime != SIMULATION:
        message_assembly.keep()
    if leave_one_out:
        if connection or nodes or resume or workers or runtime == SIMULATION or "own.leave-out" in settings:
            raise ConfigError(
                "`--leave-one-out` excludes `--connection`, `--runtime simulation`, `--nodes`, `--workers`, `--resume` and "
                "`own.leave-out`: it runs in this process"
            )
        _leave_one_out(settings, output, json_, verbose)
        return
    settings |= _of_resuming(resume, trust, settings)
    if output is not None:
        settings["output-dir"] = str(output.expanduser().absolute())
    start = settle(settings, connection, nodes, runtime, workers)
    code, summary = follow(start, verbose, _on_ray(ray, start) if ray is not None else None)
    if summary is None:
        raise typer.Exit(code)
    _show(summary, json_, own_file=data is not None)
    if not no_report:
        _try_report(Path(str(summary["run_dir"])))


def _of_ray(connection: str | None, runtime: str | None, workers: int | None, *, leave_one_out: bool) -> str:
    """Return the runtime of a run whose nodes are computed on a Ray cluster."""
    also = {"--connection": connection, "--workers": workers, "--leave-one-out": leave_one_out or None}
    also["--runtime simulation"] = True if runtime == SIMULATION else None
    for flag, given in also.items():
        if given is not None:
            raise ConfigError(f"`--ray` excludes `{flag}`: the cluster's processors compute the nodes; leave one of them out")
    return runtime or IN_PROCESS


def _on_ray(address: str, start: Start) -> "Elsewhere":
    from quickbloom.server_app.ray_cluster.nodes import nodes_on

    return nodes_on(address, parse_run_config(start.settings))


def _of_resuming(resume: Path | None, trust: str, settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The settings that `--resume` and `--trust-model` stand for."""
    if trust and "resume-from" not in settings and resume is None:
        raise ConfigError("`--trust-model` is for `--resume`: to train a model of your own, use `--set model=MODULE:FACTORY`")
    found: dict[str, Scalar] = {"model": trust} if trust else {}
    return found if resume is None else {**found, "resume-from": str(resume)}


def _show(summary: dict[str, Any], as_json: bool, *, own_file: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    screen = Console(emoji=False)
    screen.print(result_table(summary))
    if (users := users_table(summary)) is not None:
        screen.print(users)
    for baselines in baseline_tables(summary):
        screen.print(baselines)
    for line in few_tasks(summary, own_file=own_file):
        say(line)
    say(f"Run directory: {summary['run_dir']}")


def _leave_one_out(settings: dict[str, Scalar], output: Path | None, json_: bool, verbose: bool) -> None:
    """One run for each task, which it leaves out; then one table over them."""
    from quickbloom.server_app.comparing import leave_one_out as folds

    directory = output.expanduser() if output else unused(Path("runs") / f"leave-one-out-{time.strftime('%Y%m%d-%H%M%S')}")
    code, found = folds.run_all(settings, directory.absolute(), verbose)
    if found is None:
        raise typer.Exit(code)
    if json_:
        print(to_json(found))
    else:
        paper().print(folds.table(found))
        say(f"Directory: {directory.absolute()}")


def _try_report(run_dir: Path) -> None:
    """A report if the run directory is on this machine and the extra is installed; its absence is no failure of the run."""
    from quickbloom.server_app.reporting.page import missing_packages
    from quickbloom.server_app.reporting.report import write_report

    if run_dir.is_dir() and not missing_packages():
        try:
            say(f"Report: {write_report(run_dir, None)}")
        except QuickbloomError as error:
            say(f"No report: {error}")
