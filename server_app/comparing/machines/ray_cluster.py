"""The runs of a comparison on a Ray cluster that is running: a task with one processor for each, whose files come back.

The machines of the cluster share nothing but the software and, at the same paths, the data. Whether these are the data of the
comparison is checked by their hash on every machine, as for the lists of `--plan`.
"""

import io
import os
import shutil
import socket
import tarfile
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickbloom.common.config.parts import own_parts
from quickbloom.common.errors import ConfigError, QuickbloomError, in_one_line
from quickbloom.common.system.extras import needs
from quickbloom.server_app.comparing.batch import LOG, Run, Workers, start_here
from quickbloom.server_app.comparing.plan import Plan
from quickbloom.server_app.comparing.spread_out import as_run, facts_of

AUTO = "auto"
_BROKEN, _WRONG_INPUT = 70, 2
_ANSWERS = 5.0
"""Seconds in which the address has to take a connection."""


def workers(address: str, plan: Plan) -> Workers:
    """Return what starts the runs of `plan` on the cluster at `address`: HOST:PORT, ray://HOST:PORT or "auto".

    Raises ConfigError where there is none, and for parts that only this process knows.
    """
    if own := own_parts(plan.first().config()):
        raise ConfigError(
            f"`--ray` needs parts of this project, and the {next(iter(own))} is one of your own, which Ray's processes do not "
            "know: use `--jobs`"
        )
    ray = needs("simulation", "ray", "`--ray`")
    assert ray is not None
    _connect(ray, address)
    # A run that is lost with its machine starts anew when the command is repeated, like any other.
    task = ray.remote(num_cpus=1, max_retries=0)(work)
    here = str(Path.cwd())

    def start(run: Run) -> "Task":
        shutil.rmtree(run.directory, ignore_errors=True)  # what a run that was interrupted has left
        return Task(ray, task.remote(facts_of(run), here), run)

    return Workers(max(1, int(ray.cluster_resources().get("CPU", 1))), start)


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address != AUTO:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=_ANSWERS).close()  # Ray itself tries for a minute
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Ray will do in later releases
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        raise ConfigError(
            f"`--ray` must be the address of a Ray cluster that is running, HOST:PORT or {AUTO}, got '{address}', which does "
            f"not answer ({in_one_line(error)}): start one with `ray start --head`"
        ) from None


def work(facts: Mapping[str, Any], folder: str) -> tuple[int, str, bytes]:
    """Do one run on this machine: (exit code, what stood in its way, its files as a tar archive).

    `folder`: where the comparison was started; paths of data are relative to it, if it exists here.
    """
    if Path(folder).is_dir():
        os.chdir(folder)
    with tempfile.TemporaryDirectory(prefix="quickbloom-") as root:
        try:
            run = as_run(facts, Path(root), "the comparison")
        except QuickbloomError as error:
            return _WRONG_INPUT, f"on {socket.gethostname()}: {error}", b""
        going = start_here(run)
        try:
            while (code := going.poll()) is None:
                time.sleep(0.05)
        finally:  # the task may be cancelled
            going.end()
        return code, "", _packed(run.directory)


def _packed(directory: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(directory, ".")
    return buffer.getvalue()


@dataclass
class Task:
    """A run on the cluster, as `perform` follows it. `reference`: of Ray, to the result of `work`."""

    ray: Any
    reference: Any
    run: Run

    def poll(self) -> int | None:
        """Return the exit code, once the files are here."""
        done, _ = self.ray.wait([self.reference], timeout=0)
        if not done:
            return None
        try:
            code, said, files = self.ray.get(self.reference)
        except self.ray.exceptions.RayError as error:
            code, said, files = _BROKEN, f"the Ray task was lost ({in_one_line(error)})", b""
        self.run.directory.mkdir(parents=True, exist_ok=True)
        if files:
            with tarfile.open(fileobj=io.BytesIO(files)) as archive:
                archive.extractall(self.run.directory, filter="data")
        else:
            (self.run.directory / LOG).write_text(f"error: {said}\n", encoding="utf-8")
        return int(code)

    def end(self) -> None:
        """Stop the run, if it has not ended."""
        self.ray.cancel(self.reference)
