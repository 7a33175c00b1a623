"""Settles a run before it starts: its settings, its nodes and its place. Mistakes are reported now."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quickbloom.common.config.checks import check_choice
from quickbloom.common.config.parts import own_parts
from quickbloom.common.config.run import RunConfig, Scalar, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.base import resolve_data_dir
from quickbloom.common.datasets.own import Own
from quickbloom.common.errors import ConfigError, as_told
from quickbloom.common.files import check_name
from quickbloom.common.formatting import counted
from quickbloom.common.maths.kernels.compiler import find_compiler
from quickbloom.common.maths.kernels.compiler import remark as kernel_remark
from quickbloom.common.metric import named
from quickbloom.common.personal.trust import PLACES
from quickbloom.common.system import loopback, temporary
from quickbloom.common.system.extras import needs
from quickbloom.common.system.terminal import say
from quickbloom.server_app.federation.private.privacy import require_accountant
from quickbloom.server_app.launch.connection import connection_address, connection_exists
from quickbloom.server_app.launch.settings import check_with_data
from quickbloom.server_app.messaging.runtimes import DEPLOYMENT, IN_PROCESS, LOCAL, SIMULATION
from quickbloom.server_app.messaging.worker_processes import why_not
from quickbloom.server_app.runs.directory import RunDirectory, unused
from quickbloom.server_app.runs.resume import goes_on_in_place, load_checked, open_checkpoint, with_settings_of
from quickbloom.server_app.runs.trackers import check as check_live_view


@dataclass(frozen=True)
class Start:
    """A run to start: on a SuperLink `connection`, else here with so many `nodes`, by this `runtime`.

    `workers`: most processes that compute the nodes of a run in process, None: as many as there are cores.
    """

    settings: dict[str, Scalar]
    connection: str | None
    nodes: int
    runtime: str
    workers: int | None = None


NODES = 2
"""Nodes of a run here, in process and simulated alike: as many as `flwr run` simulates by itself."""


def settle(
    settings: dict[str, Scalar], connection: str | None, nodes: int | None, runtime: str | None, workers: int | None = None
) -> Start:
    """Return the run that these flags ask for, with defaults filled in. Raises ConfigError or DataError."""
    if connection is not None:
        parse_run_config(settings)
        if not connection_exists(connection):
            raise ConfigError(f"`--connection` must be a [superlink.NAME] of Flower's config.toml, got '{connection}'")
        temporary.check()
        loopback.check_socks(connection_address(connection) or "")
        check_workers(workers, nodes or NODES, DEPLOYMENT)
        return Start(settings, connection, nodes or NODES, DEPLOYMENT)
    if settings.get("resume-from"):
        settings, nodes, runtime = _go_on(settings, nodes, runtime)
    runtime = runtime or IN_PROCESS
    config = parse_run_config(settings)
    nodes = nodes or (one_for_each_task(config) if config.devices else NODES)
    check_workers(workers, nodes, runtime)
    settings = {"min-nodes": nodes, **settings}
    own = own_parts(parse_run_config(settings))
    if runtime == SIMULATION:
        check_simulation(", or choose `--runtime in-process`")
    for key, part in own.items() if runtime == SIMULATION else ():
        raise ConfigError(
            f'`{key} = "{part.name}"` is known to this process alone: choose `--runtime in-process`, or put it into '
            f"common/{key}s"
        )
    if not settings.get("output-dir"):
        settings["output-dir"] = str(_new_directory(settings).absolute())
    for remark in check_locally(parse_run_config(settings), settings, nodes):
        say(f"Remark: {remark}")
    return Start(settings, None, nodes, runtime, workers)


def check_workers(workers: int | None, nodes: int, runtime: str) -> None:
    """Raise ConfigError for a number of worker processes that a run cannot have."""
    if workers is not None and runtime != IN_PROCESS:
        raise ConfigError(f"`--workers` is for runs in process, got it with the runtime {runtime}: leave it out")
    if workers is None or workers == 1:
        return
    if reason := why_not():
        raise ConfigError(f"`--workers` must be 1 here, got {workers}: {reason}")
    if workers > nodes:
        raise ConfigError(f"`--workers` must be at most `--nodes` ({nodes}), got {workers}: a node is computed by one of them")


def one_for_each_task(config: RunConfig) -> int:
    """Return as many nodes as the data set has tasks here, for runs in which it matters how fast each of them is."""
    data = load_dataset(config.dataset, config.table(config.dataset), resolve_data_dir(config.data_dir))
    return max(1, len(data.tasks()))


def check_simulation(instead: str) -> None:
    """Raise ConfigError if Flower's simulation lacks something here. `instead`: an alternative, as the end of a sentence."""
    needs("simulation", "ray", "Flower's simulation", instead=instead, load=False)
    loopback.check_ipv4("Flower's simulation", instead)
    temporary.check()


def check_machine(config: RunConfig) -> None:
    """Raise ConfigError for a setting that needs a package or a GPU that this machine does not have."""
    check_live_view(config)
    if config.privacy.on:
        require_accountant()
    if config.compile is True and not torch.cuda.is_available() and find_compiler() is None:
        raise ConfigError("`compile = true` needs a C++ compiler, and there is none here (c++, g++, clang++): set it to false")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('`device` is "cuda", but this machine has no CUDA device: use "auto" or "cpu"')


def runtime_for(runtime: str | None, in_process: bool) -> str | None:
    """Return the runtime that `--runtime` and `--in-process` name; None if neither is given. Raises ConfigError."""
    if runtime is not None:
        check_choice("--runtime", runtime, LOCAL)
    if in_process and runtime == SIMULATION:
        raise ConfigError("`--in-process` and `--runtime simulation` exclude each other: leave one of them out")
    return IN_PROCESS if in_process else runtime


def connection_for(connection: str | None, runtime: str | None, nodes: int | None) -> str | None:
    """Return the SuperLink connection to use; None for a run on this machine alone. Raises ConfigError.

    `runtime`: the one that is asked for, if any.
    """
    if runtime and connection:
        raise ConfigError(f"`--runtime {runtime}` and `--connection` exclude each other: leave one of them out")
    if connection is None and runtime is None and nodes is None:
        return os.environ.get("QUICKBLOOM_CONNECTION") or None
    return connection


def own_data(
    data: str | None,
    task: str | None,
    target: str | None,
    dataset: str | None,
    time_column: str | None = None,
    encoder: str | None = None,
    text: str | None = None,
) -> dict[str, Scalar]:
    """Return the settings of `--data`, `--task`, `--target`, `--time`, `--encoder` and `--text`."""
    if data is None:
        if task or target or time_column or text or encoder:
            raise ConfigError(
                "`--task`, `--target`, `--time`, `--text` and `--encoder` are about a file: use them with `--data`"
            )
        return {}
    if dataset not in (None, "own"):
        raise ConfigError(f"`--data` means the data set `own`, got `--dataset {dataset}`: leave one of them out")
    path = Path(data).expanduser()
    # Flower's processes run elsewhere.
    settings: dict[str, Scalar] = {"dataset": "own", "own.path": str(path.absolute()) if path.exists() else data}
    named = {"own.task-column": task, "own.target-column": target, "own.time-column": time_column}
    named |= {"own.encoder": encoder, "own.text": text}
    return settings | {key: value for key, value in named.items() if value}


def _new_directory(settings: dict[str, Scalar]) -> Path:
    default = RunConfig()
    name = "-".join(str(settings.get(key, getattr(default, key))) for key in ("dataset", "algorithm"))
    return unused(Path("runs") / f"{name}-seed{settings.get('seed', default.seed)}-{time.strftime('%Y%m%d-%H%M%S')}")


def _go_on(settings: dict[str, Scalar], nodes: int | None, runtime: str | None) -> tuple[dict[str, Scalar], int | None, str]:
    """Return (settings, nodes, runtime) of the run to continue here, filled in from it where they are not given."""
    path = Path(str(settings["resume-from"])).expanduser().absolute()
    found = load_checked(path, lambda _: None)  # the run reports a damaged file when it reads it
    if nodes is not None:
        settings = {"min-nodes": nodes, **settings}
    merged = with_settings_of(found, settings | {"resume-from": str(path)})
    before = IN_PROCESS if found.facts["in-process"] else SIMULATION
    return merged, nodes or int(found.facts["nodes"]), runtime or before


def scored_one_by_one(own: Own, tasks: Sequence[str], metric: str) -> tuple[list[str], str]:
    """Return those of the tasks that `metric` can score when each is left out, and a sentence on the others or "".

    Raises ConfigError if it can score none.
    """
    alike = [task for task in tasks if metric == "auroc" and own.tested_on_one_class(task)]
    if not alike:
        return list(tasks), ""
    some = ", ".join(as_told(task, 60) for task in alike[:5]) + ", ..." * (len(alike) > 5)
    said = f"the test rows of {counted(len(alike), 'task')} ({some}) are of one class, which has no {named(metric).title}"
    if len(alike) == len(tasks):
        raise ConfigError(f"{said}: choose another `metric`, such as log_loss or accuracy")
    return [task for task in tasks if task not in alike], f"{said}: they only train, and the means are over the other tasks"


def check_locally(config: RunConfig, settings: dict[str, Scalar], nodes: int) -> Sequence[str]:
    """Check the data, the model, the split and the directories before Flower starts.

    Returns possible mistakes in the data, one sentence each.
    """
    if config.min_nodes > nodes:
        raise ConfigError(f"`min-nodes` must be at most `--nodes` ({nodes}), got {config.min_nodes}")
    for place in PLACES:
        if named := settings.get(place):  # Flower's processes run elsewhere
            settings[place] = str(Path(str(named)).expanduser().absolute())
    data_dir = resolve_data_dir(config.data_dir).absolute()
    settings["data-dir"] = str(data_dir)
    _, remarks = check_with_data(config, data_dir)
    check_machine(config)
    check_name("the data directory", str(data_dir))
    if config.resume_from:
        open_checkpoint(config.resolved(), lambda _: None)
    RunDirectory.create(config.output_dir, "", again=goes_on_in_place(config))
    return [*remarks, *filter(None, [kernel_remark()])]
