"""Follows a run from its start to its end: shows progress, then returns the exit code and the summary."""

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickbloom.common.config.run import RunConfig, Scalar, parse_run_config
from quickbloom.common.errors import RunError
from quickbloom.common.flower import callers
from quickbloom.common.personal.trust import flags
from quickbloom.common.system import logs
from quickbloom.common.system.processes import ENDINGS
from quickbloom.common.system.terminal import FAILED, OK, STOPPED, console, say, say_error, show, taken
from quickbloom.server_app.events.channel import Events, Listener, from_log, is_told
from quickbloom.server_app.launch.flower_run import LaunchError, LocalSuperLink, Run, bundle, unframed
from quickbloom.server_app.launch.prepare import Start
from quickbloom.server_app.messaging.runtimes import IN_PROCESS
from quickbloom.server_app.reporting.progress import Shown, progress_bar

if TYPE_CHECKING:
    from quickbloom.server_app.messaging.in_process_grid import Elsewhere

Outcome = tuple[int, dict[str, Any] | None]
"""(exit code, summary); the summary is None unless the run completed."""


def follow(start: Start, verbose: bool, elsewhere: "Elsewhere | None" = None) -> Outcome:
    """Start the run and show it to its end. `verbose`: with Flower's whole log; `elsewhere`: computes nodes of a run here."""
    if start.runtime == IN_PROCESS:
        config = parse_run_config(start.settings)
        return follow_here(config, start.nodes, verbose, workers=start.workers, elsewhere=elsewhere)
    try:
        return _follow_flower(start, verbose)
    except LaunchError as error:
        say_error(str(error))
        return FAILED, None


def _follow_flower(start: Start, verbose: bool) -> Outcome:
    """Follow a run with Flower's runtime: a simulation, or the nodes of a SuperLink. Raises LaunchError."""
    settings, connection = start.settings, start.connection
    started: Run | None = None
    known = True
    log: list[str] = []
    try:
        with ExitStack() as stack:
            progress = stack.enter_context(progress_bar(console))
            task = progress.add_task("starting Flower", total=None)
            if not console.is_terminal:
                say("starting Flower: ten seconds or more")
            if not connection and not callers.can_tell():
                say(
                    "Remark: this system does not say who talks to a port, so every user of this machine can run code through "
                    "the simulation's; with `--runtime in-process` there is none"
                )
            app = stack.enter_context(bundle())
            link = connection or stack.enter_context(LocalSuperLink(Path.cwd()))
            started = Run(app, link, settings, start.nodes)
            stack.callback(started.close)
            try:
                shown = Shown(progress, task, quiet=verbose)
                for line in started.lines():
                    _take(line, log, shown, verbose)
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
        say(f"Stopped; what was finished is in {where}.")
        if connection and started and not known:
            say(f"The run may have been taken all the same: look with `flwr list {connection}`.")
        return STOPPED, None
    if status != "finished:completed":
        say_error(shown.stopped or _reason(status, details, log))
        if shown.run_dir and shown.round:
            _say_how_to_go_on(shown.run_dir, settings, connection)
        return FAILED, None
    if shown.summary is None:
        say_error("the run completed, but its log holds no summary: read summary.json in the run directory on the server")
        return FAILED, None
    return OK, shown.summary


def follow_here(
    config: RunConfig,
    nodes: int,
    verbose: bool,
    *,
    rounds: bool = True,
    warned: set[str] | None = None,
    workers: int | None = 1,
    elsewhere: "Elsewhere | None" = None,
) -> Outcome:
    """Run without Flower's runtime, with all nodes in this process or its worker processes.

    `rounds`: whether to print a line per round. `warned`: warnings that were printed already; it
    grows. `workers`, `elsewhere`: see `InlineGrid`.
    """
    try:
        return OK, run_here(config, nodes, verbose, rounds=rounds, warned=warned, workers=workers, elsewhere=elsewhere)
    except KeyboardInterrupt:
        say(f"Stopped; what was finished is in {config.output_dir}.")
        return STOPPED, None
    except RunError as error:
        say_error(str(error))
        if rounds and any(Path(config.output_dir, "checkpoints").glob("round-*")):
            _say_how_to_go_on(config.output_dir, config.flat())
        return FAILED, None


def _say_how_to_go_on(run_dir: str, settings: Mapping[str, Scalar], connection: str | None = None) -> None:
    words = [f"--connection {connection}" if connection else "", flags(settings)]
    told = "".join(f" {word}" for word in words if word)
    say(f"The rounds before are kept; to go on: quickbloom run --resume {run_dir}{told}")


def run_here(
    config: RunConfig,
    nodes: int,
    verbose: bool = False,
    *,
    rounds: bool = True,
    shown: bool = True,
    warned: set[str] | None = None,
    listeners: Sequence[Listener] = (),
    workers: int | None = 1,
    elsewhere: "Elsewhere | None" = None,
) -> dict[str, Any]:
    """Run as `follow_here` does, but raise exceptions and return the summary. `shown`: with a bar; warnings are always printed.

    `listeners`: further receivers of every event. `workers`: see `InlineGrid`.
    """
    from quickbloom.server_app.app import run_federation
    from quickbloom.server_app.messaging.in_process_grid import InlineGrid

    with progress_bar(console, shown) as progress:
        task = progress.add_task("roll call", total=None)
        told = Shown(progress, task, rounds=rounds, quiet=verbose, warned=warned)
        with _log_to(told, verbose), InlineGrid(nodes, config.flat(), {}, workers, elsewhere) as grid:
            run_federation(grid, config, Events(told, *listeners))
    assert told.summary is not None
    return told.summary


@contextmanager
def _log_to(shown: Shown, verbose: bool) -> Iterator[None]:
    """Within this context, show Flower's log: all of it, or only the warnings of the nodes here."""
    logger = logging.getLogger("flwr")
    theirs = list(logger.handlers)
    logger.handlers = [_Handler(shown, verbose)]
    try:
        yield
    finally:
        logger.handlers = theirs


class _Handler(logging.Handler):
    """Shows every record of the log, or warnings without an event. A node's errors are part of its answer."""

    def __init__(self, shown: Shown, verbose: bool) -> None:
        super().__init__()
        self._shown, self._verbose = shown, verbose

    def emit(self, record: logging.LogRecord) -> None:
        if self._verbose:
            if not taken(record.getMessage(), record.levelno):
                show(f"{record.levelname} : {record.getMessage()}")
        elif record.levelno == logging.WARNING and not is_told(record):
            self._shown.warn(record.getMessage())


def _take(line: str, log: list[str], shown: Shown, verbose: bool) -> None:
    """Handle a line of Flower's log: an event, or text to show."""
    if event := from_log(line):
        shown(event)
        return
    log.append(line)
    if verbose and not logs.relay(line):
        show(line)


def _reason(status: str, details: str, log: list[str]) -> str:
    """Return why a run failed that did not say so itself, as far as Flower knows."""
    tail = [unframed(line) for line in log if unframed(line)][-3:]
    return f"the run ended as {status} ({details}); its log ends with: {' '.join(tail)}"
