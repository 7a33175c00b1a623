"""The `quickbloom` command."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError

from common.algorithms import ALGORITHMS
from common.config import RunConfig, Scalar, parse_run_config
from common.datasets import DATASETS
from common.datasets.base import resolve_data_dir
from common.errors import FILE_TROUBLE, ConfigError, DataError, QuickbloomError, in_one_line
from server_app import checkpoint
from server_app.history import RunDirectory, to_json, unused
from server_app.launch import LaunchError, LocalSuperLink, Run, bundle, connection_exists
from server_app.live import LogReader, progress_bar, result_table
from server_app.processes import ENDINGS
from server_app.resume import goes_on_in_place, open_checkpoint, with_settings_of
from server_app.settings import check_with_data, own_modules, parse_assignments
from server_app.tracking import check as check_live_view

OK, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 130
_DEFAULT = RunConfig()
_WIDE = 200
"""Columns of a table that goes into a file or a pipe."""

cli = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True, add_completion=False)
console = Console(stderr=True, highlight=False, emoji=False)


@cli.callback()
def _commands() -> None:
    """Few-shot personalisation for Flower federations: learn a starting point that every device makes its own.

    Example: quickbloom run --algorithm maml --dataset digits
    """


@cli.command()
def run(
    algorithm: Annotated[str | None, typer.Option(help=f"What to train: {', '.join(ALGORITHMS)}.")] = None,
    dataset: Annotated[str | None, typer.Option(help=f"Whose tasks: {', '.join(DATASETS)}.")] = None,
    data: Annotated[str | None, typer.Option(help="Your own file; see docs/own-data.md.")] = None,
    task: Annotated[str | None, typer.Option(help="Its column that says whose row it is.")] = None,
    target: Annotated[str | None, typer.Option(help="Its column to predict.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Training rounds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides the initial model, the task split and every draw.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Simulated nodes; by default 2, or 1 with --in-process.", min=1)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; repeat.")] = None,
    connection: Annotated[
        str | None,
        typer.Option(help="A SuperLink connection of Flower's config.toml; by default $QUICKBLOOM_CONNECTION, if set."),
    ] = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="All nodes in this process: same result, sooner.")] = False,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Few tasks: hold each out once, one run for each; in this process.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Directory of the run; by default a new one in ./runs.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Go on with a run that was cut off; its settings are taken over.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary alone, as JSON, on stdout.")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.html.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Flower's whole log.")] = False,
) -> None:
    """Train a starting point and test it on held-out tasks.

    Exit code: 0 the run completed, 1 it failed, 2 wrong input, 130 stopped by Ctrl-C.

    Example: quickbloom run --algorithm maml --dataset digits --rounds 100 --set maml.inner-lr=0.3

    Example: quickbloom run --resume runs/digits-maml-seed0-20260101-120000
    """
    named: dict[str, Scalar | None] = {"algorithm": algorithm, "dataset": dataset, "rounds": rounds, "seed": seed}
    settings = {key: value for key, value in named.items() if value is not None}
    settings |= _own_data(data, task, target, dataset)
    if in_process and connection:
        raise ConfigError("`--in-process` and `--connection` exclude each other: leave one of them out")
    if connection is None and not in_process and nodes is None:
        connection = os.environ.get("QUICKBLOOM_CONNECTION") or None
    settings |= parse_assignments(set_ or [], str(settings.get("algorithm", RunConfig().algorithm)))
    if leave_one_out:
        if connection or nodes or resume or "own.leave-out" in settings:
            raise ConfigError(
                "`--leave-one-out` excludes `--connection`, `--nodes`, `--resume` and `own.leave-out`: it runs here"
            )
        _leave_one_out(settings, output, json_, verbose)
        return
    if resume is not None:
        settings["resume-from"] = str(resume)
    if output is not None:
        settings["output-dir"] = str(output.expanduser().absolute())
    if connection is None:
        if settings.get("resume-from"):
            settings, nodes, in_process = _go_on(settings, nodes, in_process)
        nodes = nodes or (1 if in_process else 2)
        settings = {"min-nodes": nodes, **settings}
        if not settings.get("output-dir"):
            settings["output-dir"] = str(_new_directory(settings).absolute())
    config = parse_run_config(settings)
    if connection is None:
        assert nodes is not None
        _check_locally(config, settings, nodes)
    elif not connection_exists(connection):
        raise ConfigError(f"`--connection` must be a [superlink.NAME] of Flower's config.toml, got '{connection}'")
    try:
        if in_process:
            code, summary = _follow_here(parse_run_config(settings), nodes or 1, verbose)
        else:
            code, summary = _follow(settings, connection, nodes or 2, verbose)
    except LaunchError as error:
        _say_error(str(error))
        raise typer.Exit(FAILED) from None
    if summary is None:
        raise typer.Exit(code)
    if json_:
        print(json.dumps(summary))
    else:
        Console(emoji=False).print(result_table(summary))
        console.print(f"Run directory: {summary['run_dir']}", markup=False, soft_wrap=True)
    if not no_report:
        _try_report(Path(str(summary["run_dir"])))


@cli.command()
def compare(
    algorithms: Annotated[str, typer.Option(help=f"With commas between them: {', '.join(ALGORITHMS)}.")],
    dataset: Annotated[str, typer.Option(help=f"Whose tasks: {', '.join(DATASETS)}.")] = _DEFAULT.dataset,
    data: Annotated[str | None, typer.Option(help="Your own file; its target column is `--set own.target-column=`.")] = None,
    task: Annotated[str | None, typer.Option(help="Its column that says whose row it is.")] = None,
    seeds: Annotated[str, typer.Option(help="How many (3: seeds 0, 1, 2), or which (0,1,5).")] = "3",
    rounds: Annotated[int, typer.Option(help="Training rounds.")] = _DEFAULT.rounds,
    inner_lrs: Annotated[
        str | None, typer.Option(help="Inner rates of training to choose from; by default the data set's, / 3 and x 3.")
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="Validation accuracy (0..1) or mse to count rounds to; by default fedavg's last.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of all runs; repeat.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at once; by default one per core, 1 with --simulation.", min=1)] = None,
    simulation: Annotated[bool, typer.Option("--simulation", help="Run in Flower's simulation: same result, later.")] = False,
    output: Annotated[Path | None, typer.Option(help="Directory; by default runs/compare-DATASET.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result alone, as JSON, on stdout.")] = False,
) -> None:
    """Compare algorithms on the same held-out tasks, with rates chosen on validation tasks for all alike.

    Every run is `quickbloom run` in a process of its own. Repeat the command to go on: runs that are finished in the directory
    are kept. Exit code: 0 there is a result, 1 every run failed, 2 wrong input, 130 stopped by Ctrl-C.

    Example: quickbloom compare --algorithms fedavg,reptile,maml,protonet --dataset digits --seeds 3
    """
    from server_app import compare as comparing
    from server_app import comparison

    own = _own_data(data, task, None, None if dataset == _DEFAULT.dataset else dataset)
    dataset = str(own.pop("dataset", dataset))
    set_ = [*(f"{key}={value}" for key, value in own.items()), *(set_ or [])]
    plan = comparing.Plan(
        tuple(dict.fromkeys(name.strip() for name in algorithms.split(","))),
        comparing.parse_seeds(seeds),
        dataset,
        rounds,
        comparing.parse_rates(inner_lrs) if inner_lrs is not None else comparing.recommended_rates(dataset),
        tuple(set_),
        simulation,
    )
    plan.check(target)
    directory = output or Path("runs") / f"compare-{dataset}"
    jobs = jobs or (1 if simulation else len(os.sched_getaffinity(0)))
    with comparing.locked(directory):
        console.print(plan.describe(), markup=False, soft_wrap=True)
        try:
            entries = comparing.compare(plan, directory, jobs, console)
        except KeyboardInterrupt:
            console.print(
                f"Stopped; repeat the command to go on: {directory} keeps what is finished.", markup=False, soft_wrap=True
            )
            raise typer.Exit(STOPPED) from None
        except comparing.CompareError as error:
            _say_error(str(error))
            raise typer.Exit(FAILED) from None
        result = comparison.assemble(plan, entries, target)
        comparison.write(result, directory)
        _write_comparison_page(result, directory)
    if json_:
        print(to_json(result))
    else:
        Console(width=None if sys.stdout.isatty() else _WIDE, emoji=False).print(comparison.rich_table(result))
        for line in (*comparison.caption(result), *comparison.failures(result)):
            Console(emoji=False).print(line, markup=False, highlight=False, soft_wrap=True)
    if all(row["failed"] == len(row["runs"]) for row in result["algorithms"]):
        raise typer.Exit(FAILED)


@cli.command()
def superlink(
    secrets: Annotated[Path, typer.Option(help="The folder `superlink` of `quickbloom secrets`.", readable=False)],
    state: Annotated[Path, typer.Option(help="Directory of the SuperLink's database.", readable=False)],
    host: Annotated[str, typer.Option(help="Where runs are started; whoever reaches it can start one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The same, its port.", min=1, max=65535)] = 8000,
    fleet_host: Annotated[str, typer.Option(help="Where nodes connect.")] = "0.0.0.0",
    fleet_port: Annotated[int, typer.Option(help="The same, its port.", min=1, max=65535)] = 9092,
) -> None:
    """Run a SuperLink with TLS and authenticated nodes, whose runs survive its restart; it needs a `superexec` beside it.

    Example: quickbloom superlink --secrets secrets/superlink --state state
    """
    from server_app.serve import superlink as become_superlink

    become_superlink(secrets, state, host, port, fleet_host, fleet_port)


@cli.command()
def superexec(
    secrets: Annotated[Path, typer.Option(help="The folder `superexec` of `quickbloom secrets`.", readable=False)],
    address: Annotated[str, typer.Option("--superlink", metavar="HOST:PORT", help="Where the SuperLink starts runs.")],
    runs: Annotated[Path, typer.Option(help="A directory that it can write, for those of runs.", readable=False)] = Path(
        "runs"
    ),
) -> None:
    """Run the ServerApps of a SuperLink, in processes of their own: the server's half that computes.

    Example: quickbloom superexec --secrets secrets/superexec --superlink 127.0.0.1:8000
    """
    from server_app.serve import superexec as become_superexec

    become_superexec(secrets, address, runs)


@cli.command()
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
    from server_app.report import write_report

    print(write_report(run_dirs, output))


@cli.command()
def watch(
    run_dir: Annotated[Path | None, typer.Argument(help="Directory of a run; by default the newest in ./runs.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Say how it stands and end.")] = False,
) -> None:
    """Follow a run that goes on, from its directory alone: rounds, accuracy, nodes, failures, time left.

    Exit code: 0 it came to its end or goes on, 1 it stopped before its end, 2 there is no run, 130 Ctrl-C.

    Example: quickbloom watch runs/digits-maml-seed0-20260101-120000
    """
    from server_app import watch as watching

    try:
        fine = watching.watch(run_dir or watching.newest(Path("runs")), Console(highlight=False, emoji=False), once=once)
    except KeyboardInterrupt:
        raise typer.Exit(STOPPED) from None
    if not fine:
        raise typer.Exit(FAILED)


@cli.command()
def secrets(
    output: Annotated[Path, typer.Option(help="Directory of the secrets.")] = Path("secrets"),
    nodes: Annotated[int | None, typer.Option(help="Key pairs: node-1, node-2, ..; 3 by default.", min=0)] = None,
    host: Annotated[list[str] | None, typer.Option(help="DNS name or IP address of the SuperLink; repeat.")] = None,
    days: Annotated[int, typer.Option(help="Validity of the server certificate; the CA's: 10 years.", min=1, max=3650)] = 365,
    if_missing: Annotated[bool, typer.Option("--if-missing", help="Make them unless they are there: no error then.")] = False,
    add_node: Annotated[list[str] | None, typer.Option(metavar="NAME", help="One more key pair; repeat.")] = None,
    renew_server: Annotated[
        bool, typer.Option("--renew-server", help="New server certificate of the same CA; without --host for the same names.")
    ] = False,
    register: Annotated[
        str | None, typer.Option(metavar="CONNECTION", help="Register the public keys of all nodes with this SuperLink.")
    ] = None,
    owner: Annotated[
        int | None, typer.Option(metavar="UID", help="Give what is written to this user; needs root.", min=0)
    ] = None,
) -> None:
    """Make what TLS and node authentication need: CA, server certificate, a key pair per node, the SuperExec's secret.

    One folder for each machine. What is there stays as it is, but for --renew-server.
    Exit code: 0 done, 1 the SuperLink did not take a key, 2 wrong input.

    Example: quickbloom secrets --nodes 3 --host superlink --host fl.example.org --host 203.0.113.5

    Later: quickbloom secrets --add-node ward-7; quickbloom secrets --renew-server; quickbloom secrets --register CONNECTION
    """
    from server_app.registration import RegistrationError
    from server_app.registration import register as register_keys
    from server_app.secrets import Request, carry_out, public_keys

    request = Request(
        output, nodes, tuple(host or ()), days, if_missing, tuple(add_node or ()), renew_server, bool(register), owner
    )
    if register and not connection_exists(register):
        raise ConfigError(f"`--register` must be a [superlink.NAME] of Flower's config.toml, got '{register}'")
    paper = Console(width=None if sys.stdout.isatty() else _WIDE, emoji=False, highlight=False)
    for item in carry_out(request):
        paper.print(item, markup=False, soft_wrap=isinstance(item, str))
    try:
        for line in register_keys(register, public_keys(output)) if register else ():
            paper.print(line, markup=False, soft_wrap=True)
    except RegistrationError as error:
        _say_error(str(error))
        raise typer.Exit(FAILED) from None


def main() -> None:
    """Entry point: a mistake in the input ends in one sentence on stderr and exit code 2, a full disk in one and code 1."""
    # Ended from outside (a time limit, a closed terminal) is like Ctrl-C: what was started must be ended, too.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:  # as under nohup
            signal.signal(ending, signal.default_int_handler)
    try:
        cli()
    except QuickbloomError as error:
        _say_error(str(error))
        sys.exit(WRONG_INPUT)
    except (ConnectionError, TimeoutError):
        raise  # not about files, and a defect
    except (OSError, SafetensorError) as error:
        _say_error(f"{FILE_TROUBLE} ({in_one_line(error)}): free some space, or choose another `--output`")
        sys.exit(FAILED)


def _own_data(data: str | None, task: str | None, target: str | None, dataset: str | None) -> dict[str, Scalar]:
    """The settings that `--data`, `--task` and `--target` stand for."""
    if data is None:
        if task or target:
            raise ConfigError("`--task` and `--target` name columns of a file: use them with `--data`")
        return {}
    if dataset not in (None, "own"):
        raise ConfigError(f"`--data` means the data set `own`, got `--dataset {dataset}`: leave one of them out")
    path = Path(data).expanduser()
    # Flower's processes run elsewhere.
    settings: dict[str, Scalar] = {"dataset": "own", "own.path": str(path.absolute()) if path.exists() else data}
    named = {"own.task-column": task, "own.target-column": target}
    return settings | {key: value for key, value in named.items() if value}


def _leave_one_out(settings: dict[str, Scalar], output: Path | None, json_: bool, verbose: bool) -> None:
    """One run for each task, which it leaves out; then one table over them."""
    from server_app import leave_one_out as folds

    settings = {"min-nodes": 1, **settings}
    tasks = folds.tasks_of(parse_run_config(settings))
    directory = (
        output.expanduser() if output else unused(Path("runs") / f"leave-one-out-{time.strftime('%Y%m%d-%H%M%S')}")
    ).absolute()
    summaries = []
    for task in tasks:
        own = folds.fold(settings, task, len(tasks), directory)
        _check_locally(parse_run_config(own), own, 1)
        console.print(f"Leaving out {task}", markup=False, soft_wrap=True)
        code, summary = _follow_here(parse_run_config(own), 1, verbose)
        if summary is None:
            raise typer.Exit(code)
        summaries.append(summary)
    listed = folds.rows(tasks, summaries)
    found = folds.result(listed, folds.metric(summaries[0]))
    folds.write(directory, found)
    if json_:
        print(to_json(found))
    else:
        Console(width=None if sys.stdout.isatty() else _WIDE, emoji=False).print(folds.table(found))
        console.print(f"Directory: {directory}", markup=False, soft_wrap=True)


def _new_directory(settings: dict[str, Scalar]) -> Path:
    default = RunConfig()
    name = "-".join(str(settings.get(key, getattr(default, key))) for key in ("dataset", "algorithm"))
    return unused(Path("runs") / f"{name}-seed{settings.get('seed', default.seed)}-{time.strftime('%Y%m%d-%H%M%S')}")


def _go_on(settings: dict[str, Scalar], nodes: int | None, in_process: bool) -> tuple[dict[str, Scalar], int | None, bool]:
    """(settings, nodes, in process) of the run to go on with here, where they are not given."""
    path = Path(str(settings["resume-from"])).expanduser().absolute()
    found = checkpoint.load(path, lambda _: None)  # a damaged file is told of when the run reads it
    if nodes is not None:
        settings = {"min-nodes": nodes, **settings}
    merged = with_settings_of(found, settings | {"resume-from": str(path)})
    return merged, nodes or int(found.facts["nodes"]), in_process or bool(found.facts["in-process"])


def _check_locally(config: RunConfig, settings: dict[str, Scalar], nodes: int) -> None:
    """Find what is wrong with the data, the model, the split and the directories now, not after Flower has started."""
    if config.min_nodes > nodes:
        raise ConfigError(f"`min-nodes` must be at most `--nodes` ({nodes}), got {config.min_nodes}")
    data_dir = resolve_data_dir(config.data_dir).absolute()
    settings["data-dir"] = str(data_dir)
    check_with_data(config, data_dir)
    check_live_view(config)
    if config.resume_from:
        open_checkpoint(config.resolved(), lambda _: None)
    RunDirectory.create(config.output_dir, "", again=goes_on_in_place(config))


def _follow(
    settings: dict[str, Scalar], connection: str | None, nodes: int, verbose: bool
) -> tuple[int, dict[str, Any] | None]:
    """Start the run, show it, and return (exit code, summary); the summary is None unless the run completed."""
    started: Run | None = None
    known = True
    try:
        with ExitStack() as stack:
            progress = stack.enter_context(progress_bar(console))
            task = progress.add_task("starting Flower", total=None)
            if not console.is_terminal:
                console.print("starting Flower")
            app = stack.enter_context(bundle())
            link = connection or stack.enter_context(LocalSuperLink(own_modules(str(settings.get("model", "auto")))))
            started = Run(app, link, settings, nodes)
            stack.callback(started.close)
            try:
                log, reader = _show(started, progress, task, verbose)
                status, details = started.status()
            except BaseException:
                # From here on nothing may interrupt: a second Ctrl-C would leave processes behind.
                for ending in ENDINGS:
                    signal.signal(ending, signal.SIG_IGN)
                progress.update(task, description="stopping the run")
                known = started.stop()
                raise
    except KeyboardInterrupt:
        where = settings.get("output-dir", "the run directory on the server")
        console.print(f"Stopped; what was finished is in {where}.", markup=False, soft_wrap=True)
        if connection and started and not known:
            console.print(f"The run may have been taken all the same: look with `flwr list {connection}`.", markup=False)
        return STOPPED, None
    if status != "finished:completed":
        _say_error(_reason(status, details, log))
        if reader.run_dir and reader.round > 1:
            told = f" --connection {connection}" if connection else ""
            console.print(
                f"The rounds before are kept; to go on: quickbloom run --resume {reader.run_dir}{told}",
                markup=False,
                soft_wrap=True,
            )
        return FAILED, None
    if reader.summary is None:
        _say_error("the run completed, but its log holds no summary: read summary.json in the run directory on the server")
        return FAILED, None
    return OK, reader.summary


def _follow_here(config: RunConfig, nodes: int, verbose: bool) -> tuple[int, dict[str, Any] | None]:
    """The same with all nodes in this process and without Flower's runtime."""
    from server_app.app import run_federation
    from server_app.inline import InlineGrid
    from server_app.strategy import RunError

    logger = logging.getLogger("flwr")
    theirs, reader = list(logger.handlers), LogReader()
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("roll call", total=None)
            logger.handlers = [_LineHandler(lambda line: _show_line(line, reader, progress, task, verbose))]
            return OK, run_federation(InlineGrid(nodes, config.flat(), {}), config)
    except KeyboardInterrupt:
        console.print(f"Stopped; what was finished is in {config.output_dir}.", markup=False, soft_wrap=True)
        return STOPPED, None
    except RunError as error:
        _say_error(str(error))
        return FAILED, None
    finally:
        logger.handlers = theirs


class _LineHandler(logging.Handler):
    """Hands every record on as a line of the form that Flower's log has."""

    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__()
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        self._take(f"{record.levelname} : {record.getMessage()}")


def _show(started: Run, progress: Progress, task: Any, verbose: bool) -> tuple[list[str], LogReader]:
    """Follow the log to its end and show what a person wants to see of it."""
    log: list[str] = []
    reader = LogReader()
    for line in started.lines():
        log.append(line)
        _show_line(line, reader, progress, task, verbose)
    return log, reader


def _show_line(line: str, reader: LogReader, progress: Progress, task: Any, verbose: bool) -> None:
    said = reader.read(line)
    if verbose or said:
        # Never as markup: parts of it come from nodes.
        console.print(line if verbose else said, markup=False, style="yellow" if reader.warned else None, soft_wrap=True)
    if reader.round:
        progress.update(task, description="training", total=reader.total, completed=reader.round - 1)
    elif "Run directory" in line:
        progress.update(task, description="roll call")


def _reason(status: str, details: str, log: list[str]) -> str:
    """Why a run failed, in one sentence: Flower puts the exception's text behind "exception: "."""
    _, found, sentence = details.partition("exception: ")
    if found:
        return sentence
    tail = [line for line in log if line.strip()][-3:]
    return f"the run ended as {status} ({details}); its log ends with: {' '.join(tail)}"


def _say_error(sentence: str) -> None:
    console.print("error:", style="bold red", end=" ")
    console.print(sentence, markup=False, soft_wrap=True)


def _write_comparison_page(result: dict[str, Any], directory: Path) -> None:
    """The page if the extra is installed; the other files are there either way."""
    from server_app.comparison_page import write_comparison_page

    try:
        page = write_comparison_page(result, directory / "comparison.html")
        console.print(f"Comparison: {page}", markup=False, soft_wrap=True)
    except DataError as error:
        console.print(f"Comparison: {directory / 'comparison.md'}; no plots: {error}", markup=False, soft_wrap=True)


def _try_report(run_dir: Path) -> None:
    """A report if the run directory is on this machine and the extra is installed; its absence is no failure of the run."""
    from server_app.page import missing_packages
    from server_app.report import write_report

    if run_dir.is_dir() and not missing_packages():
        try:
            console.print(f"Report: {write_report(run_dir, None)}", markup=False, soft_wrap=True)
        except QuickbloomError as error:
            console.print(f"No report: {error}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
