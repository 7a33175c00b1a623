"""The `quickbloom` command."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from safetensors import SafetensorError

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.key_value import assignment
from quickbloom.common.config.run import RunConfig, Scalar, table_types
from quickbloom.common.datasets import DATASETS
from quickbloom.common.errors import FILE_TROUBLE, ConfigError, DataError, QuickbloomError, in_one_line
from quickbloom.common.system import surroundings
from quickbloom.common.system.terminal import FAILED, STOPPED, WRONG_INPUT, console, paper, say, say_error
from quickbloom.server_app.cli.doctor import doctor
from quickbloom.server_app.launch.flower_run import connection_exists
from quickbloom.server_app.launch.follow import follow
from quickbloom.server_app.launch.prepare import connection_for, own_data, settle
from quickbloom.server_app.launch.settings import parse_assignments
from quickbloom.server_app.reporting.live import few_tasks, result_table
from quickbloom.server_app.runs.directory import to_json, unused

_DEFAULT = RunConfig()

_DATASETS = ", ".join(f"{name} (needs files)" if data.needs_files else name for name, data in DATASETS.items())

cli = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True, add_completion=False)


@cli.callback()
def _commands() -> None:
    """Few-shot personalisation for Flower federations: learn a starting point that every device makes its own.

    Example: quickbloom run --algorithm maml --dataset digits
    """


@cli.command()
def run(
    algorithm: Annotated[str | None, typer.Option(help=f"What to train: {', '.join(ALGORITHMS)}.")] = None,
    dataset: Annotated[str | None, typer.Option(help=f"Whose tasks: {_DATASETS}.")] = None,
    data: Annotated[str | None, typer.Option(help="Your own file; see docs/own-data.md.")] = None,
    task: Annotated[str | None, typer.Option(help="Its column that says whose row it is.")] = None,
    target: Annotated[str | None, typer.Option(help="Its column to predict.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Training rounds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides the initial model, the task split and every draw.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Simulated nodes; by default 2, or 1 with --in-process.", min=1)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, see `quickbloom settings`; repeat."),
    ] = None,
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
    trust: Annotated[
        str,
        typer.Option("--trust-model", metavar="MODULE:FACTORY", help="With --resume: own code that its checkpoint may name."),
    ] = "",
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
    settings |= own_data(data, task, target, dataset)
    connection = connection_for(connection, in_process, nodes)
    settings |= parse_assignments(set_ or [], str(settings.get("algorithm", _DEFAULT.algorithm)))
    if leave_one_out:
        if connection or nodes or resume or "own.leave-out" in settings:
            raise ConfigError(
                "`--leave-one-out` excludes `--connection`, `--nodes`, `--resume` and `own.leave-out`: it runs here"
            )
        _leave_one_out(settings, output, json_, verbose)
        return
    if trust and "resume-from" not in settings and resume is None:
        raise ConfigError("`--trust-model` is for `--resume`: to train a model of your own, use `--set model=MODULE:FACTORY`")
    if trust:
        settings["model"] = trust
    if resume is not None:
        settings["resume-from"] = str(resume)
    if output is not None:
        settings["output-dir"] = str(output.expanduser().absolute())
    code, summary = follow(settle(settings, connection, nodes, in_process), verbose)
    if summary is None:
        raise typer.Exit(code)
    if json_:
        print(json.dumps(summary))
    else:
        Console(emoji=False).print(result_table(summary))
        for line in few_tasks(summary, own_file=data is not None):
            say(line)
        say(f"Run directory: {summary['run_dir']}")
    if not no_report:
        _try_report(Path(str(summary["run_dir"])))


@cli.command()
def compare(
    algorithms: Annotated[str, typer.Option(help=f"With commas between them: {', '.join(ALGORITHMS)}.")],
    dataset: Annotated[str, typer.Option(help=f"Whose tasks: {_DATASETS}.")] = _DEFAULT.dataset,
    data: Annotated[str | None, typer.Option(help="Your own file; see docs/own-data.md.")] = None,
    task: Annotated[str | None, typer.Option(help="Its column that says whose row it is.")] = None,
    target: Annotated[str | None, typer.Option(help="Its column to predict.")] = None,
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
    """
    from quickbloom.server_app.comparing import plan as comparing
    from quickbloom.server_app.comparing import result as comparison

    own = own_data(data, task, target, None if dataset == _DEFAULT.dataset else dataset)
    dataset = str(own.pop("dataset", dataset))
    set_ = [*(assignment(key, value) for key, value in own.items()), *(set_ or [])]
    plan = comparing.Plan(
        tuple(dict.fromkeys(name.strip() for name in algorithms.split(","))),
        comparing.parse_seeds(seeds),
        dataset,
        rounds,
        comparing.parse_rates(inner_lrs) if inner_lrs is not None else comparing.recommended_rates(dataset),
        tuple(set_),
        simulation,
    )
    plan.check(target_score)
    directory = output or Path("runs") / f"compare-{dataset}"
    jobs = jobs or (1 if simulation else len(os.sched_getaffinity(0)))
    with comparing.locked(directory):
        say(plan.describe())
        try:
            entries = comparing.compare(plan, directory, jobs, console)
        except KeyboardInterrupt:
            say(f"Stopped; repeat the command to go on: {directory} keeps what is finished.")
            raise typer.Exit(STOPPED) from None
        except comparing.CompareError as error:
            say_error(str(error))
            raise typer.Exit(FAILED) from None
        result = comparison.assemble(plan, entries, target_score)
        comparison.write(result, directory)
        _write_comparison_page(result, directory)
    if json_:
        print(to_json(result))
    else:
        paper().print(comparison.rich_table(result))
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
    fleet_host: Annotated[
        str | None, typer.Option(help="Where nodes connect; by default 0.0.0.0; from Flower 1.40 on that is --host.")
    ] = None,
    fleet_port: Annotated[int | None, typer.Option(help="The same, its port; by default 9092.", min=1, max=65535)] = None,
) -> None:
    """Run a SuperLink with TLS and authenticated nodes, whose runs survive its restart; it needs a `superexec` beside it.

    Example: quickbloom superlink --secrets secrets/superlink --state state
    """
    from quickbloom.server_app.deployment.serve import superlink as become_superlink

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
    from quickbloom.server_app.deployment.serve import superexec as become_superexec

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
    from quickbloom.server_app.reporting.report import write_report

    print(write_report(run_dirs, output))


@cli.command()
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


@cli.command()
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


cli.command()(doctor)


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
    from quickbloom.server_app.deployment.registration import RegistrationError
    from quickbloom.server_app.deployment.registration import register as register_keys
    from quickbloom.server_app.deployment.secrets import Request, carry_out, public_keys

    request = Request(
        output, nodes, tuple(host or ()), days, if_missing, tuple(add_node or ()), renew_server, bool(register), owner
    )
    if register and not connection_exists(register):
        raise ConfigError(f"`--register` must be a [superlink.NAME] of Flower's config.toml, got '{register}'")
    page = paper()
    for item in carry_out(request):
        page.print(item, markup=False, highlight=False, soft_wrap=isinstance(item, str))
    try:
        for line in register_keys(register, public_keys(output)) if register else ():
            page.print(line, markup=False, highlight=False, soft_wrap=True)
    except RegistrationError as error:
        say_error(str(error))
        raise typer.Exit(FAILED) from None


def main() -> None:
    """Entry point: a mistake in the input ends in one sentence on stderr and exit code 2, a full disk in one and code 1."""
    surroundings.begin()
    # Ended from outside (a time limit, a closed terminal) is like Ctrl-C: what was started must be ended, too.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:  # as under nohup
            signal.signal(ending, signal.default_int_handler)
    try:
        surroundings.check_names(sys.argv[1:])
        cli()
    except QuickbloomError as error:
        say_error(str(error))
        sys.exit(WRONG_INPUT)
    except (ConnectionError, TimeoutError):
        raise  # not about files, and a defect
    except (OSError, SafetensorError) as error:
        say_error(f"{FILE_TROUBLE} ({in_one_line(error)}): free some space, or choose another `--output`")
        sys.exit(FAILED)


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


def _write_comparison_page(result: dict[str, Any], directory: Path) -> None:
    """The page if the extra is installed; the other files are there either way."""
    from quickbloom.server_app.comparing.page import write_comparison_page

    try:
        page = write_comparison_page(result, directory / "comparison.html")
        say(f"Comparison: {page}")
    except DataError as error:
        say(f"Comparison: {directory / 'comparison.md'}; no plots: {error}")


def _try_report(run_dir: Path) -> None:
    """A report if the run directory is on this machine and the extra is installed; its absence is no failure of the run."""
    from quickbloom.server_app.reporting.page import missing_packages
    from quickbloom.server_app.reporting.report import write_report

    if run_dir.is_dir() and not missing_packages():
        try:
            say(f"Report: {write_report(run_dir, None)}")
        except QuickbloomError as error:
            say(f"No report: {error}")


if __name__ == "__main__":
    main()
