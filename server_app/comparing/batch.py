"""Runs of the real command, each in a process of its own with one thread. What is finished is kept and not repeated.

A run leaves its run directory, the command's stderr as `command.log`, and at the end `finished.json`: a directory without that
file is half done, and the run starts anew.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from quickbloom import __version__
from quickbloom.common.config.parts import PRIVACY, own_parts
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.errors import FILE_TROUBLE
from quickbloom.common.models import MODELS, is_own_model
from quickbloom.common.system import user_code
from quickbloom.common.system.processes import end_group, uninterrupted
from quickbloom.common.system.whole_files import whole
from quickbloom.server_app.comparing import fingerprint
from quickbloom.server_app.events.file import read_events
from quickbloom.server_app.events.kinds import Failed, Warned
from quickbloom.server_app.launch.flower_run import CPU_ENVIRONMENT
from quickbloom.server_app.launch.settings import parse_assignments
from quickbloom.server_app.messaging.runtimes import IN_PROCESS, SIMULATION
from quickbloom.server_app.runs.directory import read_history
from quickbloom.server_app.runs.program import named, program

_NOT_COMPARED = ("output-dir", "data-dir", "resume-from", "seed", "tensorboard", "mlflow", "wandb")
FINISHED, LOG = "finished.json", "command.log"
_TRACEBACK = "Traceback (most recent call last)"
_PATIENCE = 60.0
"""Seconds that a run has to end what it started when it is stopped: a SuperLink takes its time."""


@dataclass(frozen=True)
class Setup:
    """The settings of `quickbloom run` but for the seed. `settings`: texts "key=value", as after `--set`.

    `name`: what a comparison calls it, "" for the algorithm's name; `searched`: those settings that tell it from the other
    candidates, in words. Both decide nothing. `data`: what it reads, None: found when it is asked for.
    """

    algorithm: str
    dataset: str
    rounds: int
    settings: tuple[str, ...] = ()
    nodes: int = 2
    in_process: bool = False
    name: str = field(default="", compare=False)
    searched: tuple[str, ...] = field(default=(), compare=False)
    data: fingerprint.Data | None = field(default=None, compare=False)

    def command(self, seed: int | str) -> list[str]:
        """What a user would type to repeat one run."""
        command = [
            *program(named({"algorithm": self.algorithm, "dataset": self.dataset}, self.settings)),
            "run",
            "--algorithm",
            self.algorithm,
            "--dataset",
            self.dataset,
        ]
        command += ["--rounds", str(self.rounds), "--nodes", str(self.nodes), "--seed", str(seed)]
        command += ["--runtime", IN_PROCESS if self.in_process else SIMULATION]
        for text in self.settings:
            command += ["--set", text]
        return [*command, "--json"]

    def config(self, seed: int = 0) -> RunConfig:
        """The settings as the command understands them. Raises ConfigError for what it would refuse."""
        named: dict[str, Any] = {"algorithm": self.algorithm, "dataset": self.dataset, "rounds": self.rounds, "seed": seed}
        named["min-nodes"] = self.nodes
        return parse_run_config(named | parse_assignments(list(self.settings), self.algorithm)).resolved()

    def effective(self) -> dict[str, Any]:
        """Every setting that can matter, defaults included, and nothing that belongs to a machine or to one seed."""
        config = self.config()
        models = MODELS if config.model == "auto" else [config.model]  # which one it is only the data say
        tables = ("", PRIVACY, config.algorithm, config.dataset, *models)
        flat = config.flat().items()
        return {key: value for key, value in flat if key.rpartition(".")[0] in tables and key not in _NOT_COMPARED}


@dataclass(frozen=True)
class Run:
    """One run of a setup: its directory below `root` is named after everything that decides the result."""

    setup: Setup
    seed: int
    root: Path

    @property
    def directory(self) -> Path:
        settings, data = self.setup.effective(), self.setup.data or fingerprint.of_files(self.setup.config())
        decisive = [
            {**settings, **data.placeless},  # the same data in another place are the same
            _own_code(settings["model"]) + _own_files(self.setup) + data.digest,
            self.setup.nodes,
            self.setup.in_process,
            self.seed,
            __version__,
        ]
        key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:10]
        return self.root / f"{self.setup.algorithm}-seed{self.seed}-{key}"

    def result(self) -> "Result | None":
        """What the run left; None if it is not finished."""
        file = self.directory / FINISHED
        return Result(self, json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


@dataclass(frozen=True)
class Result:
    """The end of a run. `code`: exit code of the command; `facts`: "wall" (seconds), "date", and what the caller adds.

    A run whose code is not 0 has no summary; `failure` is then what the command said.
    """

    run: Run
    facts: Mapping[str, Any]
    code: int = 0
    failure: str = ""

    @property
    def broken(self) -> bool:
        """Whether it says nothing about the run's settings: a defect, a signal, or a disk that is full."""
        return self.code not in (0, 1) or _TRACEBACK in self.failure or self.failure.startswith(FILE_TROUBLE)

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.run.directory / "summary.json").read_text(encoding="utf-8")))

    @property
    def warnings(self) -> list[str]:
        """What its user should know, each sentence once."""
        told = (event.sentence for event in read_events(self.run.directory) if isinstance(event, Warned | Failed))
        return list(dict.fromkeys(told))

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The lines of history.jsonl, as many as there are."""
        return read_history(self.run.directory)


class Going(Protocol):
    """A run that has been started."""

    def poll(self) -> int | None:
        """Return the exit code of the command; None as long as it goes on."""

    def end(self) -> None:
        """End it, if it goes on, with all that it started."""


@dataclass(frozen=True)
class _Process:
    popen: "subprocess.Popen[bytes]"

    def poll(self) -> int | None:
        return self.popen.poll()

    def end(self) -> None:
        end_group(self.popen, _PATIENCE)


@dataclass(frozen=True)
class Workers:
    """What does the runs: as many at once as `number` says when it is asked, each started by `start`."""

    number: Callable[[], int]
    start: Callable[[Run], Going]


def perform(
    wanted: Sequence[Run],
    jobs: int | Workers = 1,
    facts: Mapping[str, Any] | None = None,
    on_start: Callable[[Run], None] = lambda run: None,
    on_end: Callable[[Result, bool], None] = lambda result, kept: None,
) -> dict[Run, Result]:
    """Do what is not finished of `wanted`, `jobs` runs at once here, or elsewhere; whatever ends this function ends its runs.

    `facts` are written down with every new run. `on_end(result, kept)` is called for every run, also for one that failed; it
    may raise to end everything.
    """
    workers = jobs if isinstance(jobs, Workers) else Workers(lambda: jobs, start_here)
    results: dict[Run, Result] = {}
    waiting: list[Run] = []
    running: dict[Run, tuple[Going, float]] = {}
    for run in wanted:
        if kept := run.result():
            results[run] = kept
            on_end(kept, True)
        else:
            waiting.append(run)
    try:
        while waiting or running:
            while waiting and len(running) < workers.number():
                run = waiting.pop(0)
                on_start(run)
                running[run] = workers.start(run), time.perf_counter()
            for run, (going, started) in list(running.items()):
                if (code := going.poll()) is not None:
                    del running[run]
                    wall = time.perf_counter() - started
                    results[run] = _finish(run, code, {"wall": wall, "date": today(), **(facts or {})})
                    on_end(results[run], False)
            time.sleep(0.02)
    finally:
        with uninterrupted():
            for going, _ in running.values():
                going.end()
    return {run: results[run] for run in wanted}


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def _own_code(model: str) -> str:
    """The file of a user's own model: it decides the result as the settings do. "" for any other model."""
    user_code.add_folder()
    spec = find_spec(model.partition(":")[0]) if is_own_model(model) else None
    return Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""


def _own_files(setup: Setup) -> str:
    """The files of the parts that a user registered, an algorithm, a data set or a model; "" if there are none."""
    files = dict.fromkeys(inspect.getfile(part) for part in own_parts(setup.config()).values())
    return "".join(Path(file).read_text(encoding="utf-8") for file in files)


def start_here(run: Run, before: Callable[[], None] | None = None) -> Going:
    """Start a run in a process of its own on this machine. `before`: what that process does first, not on Windows."""
    shutil.rmtree(run.directory, ignore_errors=True)  # what a run that was interrupted has left
    run.directory.mkdir(parents=True)
    command = run.setup.command(run.seed)
    # This Python and its own script, so that the command is the one of this environment.
    if command[0] == "python":
        command[0] = sys.executable
    else:
        command[0] = str(Path(sys.executable).parent / command[0])
    with (run.directory / LOG).open("wb") as log:
        return _Process(
            subprocess.Popen(
                [*command, "--output", str(run.directory.absolute()), "--no-report", *_alone(run)],
                env={**os.environ, **CPU_ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                # In a session of its own: Ctrl-C reaches this process alone, which then ends its runs in order.
                start_new_session=True,
                preexec_fn=before,
            )
        )


def _alone(run: Run) -> list[str]:
    """Return what keeps a run to one process, since runs share the cores; the result is the same."""
    return ["--workers", "1"] if run.setup.in_process else []


def _finish(run: Run, code: int, facts: dict[str, Any]) -> Result:
    if code:
        # A run that failed is not kept: what stood in its way may be gone the next time.
        said = (run.directory / LOG).read_text(encoding="utf-8", errors="replace").strip()
        return Result(run, facts, code, _failure(said))
    with whole(run.directory / FINISHED) as file:
        json.dump(facts, file)
    return Result(run, facts)


def _failure(said: str) -> str:
    """The sentence behind the last "error: " that begins a line; of a defect, which leaves a traceback, everything."""
    return said if _TRACEBACK in said else re.split(r"^error: ", said, flags=re.MULTILINE)[-1]
