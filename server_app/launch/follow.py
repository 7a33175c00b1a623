"""Following a run from its start to its end: progress for a person, then the exit code and the summary."""

import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.progress import Progress

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.flower import callers
from quickbloom.common.personal.trust import flags
from quickbloom.common.printable import one_line
from quickbloom.common.system.processes import ENDINGS
from quickbloom.common.system.terminal import FAILED, OK, STOPPED, console, say, say_error
from quickbloom.server_app.launch.flower_run import LaunchError, LocalSuperLink, Run, bundle, unframed
from quickbloom.server_app.launch.prepare import Start
from quickbloom.server_app.reporting.live import LogReader, progress_bar

Outcome = tuple[int, dict[str, Any] | None]
"""(exit code, summary); the summary is None unless the run completed."""


def follow(start: Start, verbose: bool) -> Outcome:
    """Start the run and show it to its end. `verbose`: with Flower's whole log."""
    if start.in_process:
        return follow_here(parse_run_config(start.settings), start.nodes, verbose)
    try:
        return _follow_flower(start, verbose)
    except LaunchError as error:
        say_error(str(error))
        return FAILED, None


def _follow_flower(start: Start, verbose: bool) -> Outcome:
    """With Flower's runtime: a simulation, or the nodes of a SuperLink. Raises LaunchError."""
    settings, connection = start.settings, start.connection
    started: Run | None = None
    known = True
    try:
        with ExitStack() as stack:
            progress = stack.enter_context(progress_bar(console))
            task = progress.add_task("starting Flower", total=None)
            if not console.is_terminal:
                console.print("starting Flower: ten seconds or more")
            if not connection and not callers.can_tell():
                say(
                    "Remark: this system does not say who talks to a port, so every user of this machine can run code through "
                    "the simulation's; with `--in-process` there is none"
                )
            app = stack.enter_context(bundle())
            link = connection or stack.enter_context(LocalSuperLink(Path.cwd()))
            started = Run(app, link, settings, start.nodes)
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
        say(f"Stopped; what was finished is in {where}.")
        if connection and started and not known:
            say(f"The run may have been taken all the same: look with `flwr list {connection}`.")
        return STOPPED, None
    if status != "finished:completed":
        say_error(_reason(status, details, log))
        if reader.run_dir and reader.round > 1:
            told = "".join(
                f" {words}" for words in (f"--connection {connection}" if connection else "", flags(settings)) if words
            )
            say(f"The rounds before are kept; to go on: quickbloom run --resume {reader.run_dir}{told}")
        return FAILED, None
    if reader.summary is None:
        say_error("the run completed, but its log holds no summary: read summary.json in the run directory on the server")
        return FAILED, None
    return OK, reader.summary


def follow_here(config: RunConfig, nodes: int, verbose: bool, *, rounds: bool = True) -> Outcome:
    """A run with all nodes in this process and without Flower's runtime. `rounds`: whether to tell of them line by line."""
    from quickbloom.server_app.app import run_federation
    from quickbloom.server_app.federation.strategy import RunError
    from quickbloom.server_app.messaging.in_process_grid import InlineGrid

    logger = logging.getLogger("flwr")
    theirs, reader = list(logger.handlers), LogReader()
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("roll call", total=None)
            logger.handlers = [_LineHandler(lambda line: _show_line(line, reader, progress, task, verbose, rounds))]
            return OK, run_federation(InlineGrid(nodes, config.flat(), {}), config)
    except KeyboardInterrupt:
        say(f"Stopped; what was finished is in {config.output_dir}.")
        return STOPPED, None
    except RunError as error:
        say_error(str(error))
        return FAILED, None
    finally:
        logger.handlers = theirs


class _LineHandler(logging.Handler):
    """Hands every record on as a line of the form that Flower's log has."""

    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__()
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        self._take(f"{record.levelname} : {one_line(record.getMessage())}")


def _show(started: Run, progress: Progress, task: Any, verbose: bool) -> tuple[list[str], LogReader]:
    """Follow the log to its end and show what a person wants to see of it."""
    log: list[str] = []
    reader = LogReader()
    for line in started.lines():
        log.append(line)
        _show_line(line, reader, progress, task, verbose)
    return log, reader


def _show_line(line: str, reader: LogReader, progress: Progress, task: Any, verbose: bool, rounds: bool = True) -> None:
    said = reader.read(line)
    if verbose or (said and (rounds or reader.warned)):
        # Never as markup: parts of it come from nodes.
        console.print(
            one_line(line if verbose else said or ""), markup=False, style="yellow" if reader.warned else None, soft_wrap=True
        )
    if reader.round:
        progress.update(task, description="training", total=reader.total, completed=reader.round - 1)
    elif "Run directory" in line:
        progress.update(task, description="roll call")


def _reason(status: str, details: str, log: list[str]) -> str:
    """Why a run failed, in one sentence: Flower puts the exception's text behind "exception: "."""
    _, found, sentence = details.partition("exception: ")
    if found:
        return sentence
    tail = [unframed(line) for line in log if unframed(line)][-3:]
    return f"the run ended as {status} ({details}); its log ends with: {' '.join(tail)}"
