"""The runs of a comparison on a Ray cluster that is running: a task with one processor for each, whose files come back.

The machines of the cluster share nothing but the software and, at the same paths, the data. Whether these are the data of the
comparison is checked by their hash on every machine, as for the lists of `--plan`.
"""

import io
import os
import shutil
import signal
import socket
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from quickbloom.common.errors import QuickbloomError, in_one_line
from quickbloom.common.formatting import counted
from quickbloom.common.system.processes import end_with_parent
from quickbloom.common.system.terminal import say
from quickbloom.server_app.comparing.batch import LOG, Run, Workers, start_here
from quickbloom.server_app.comparing.plan import Plan
from quickbloom.server_app.comparing.spread_out import as_run, facts_of
from quickbloom.server_app.comparing.watching import describe
from quickbloom.server_app.ray_cluster.connecting import Processors, check_parts, connect, head_of, is_lost

_BROKEN, _WRONG_INPUT = 70, 2
_TRIES = 3
"""How often a run is started that is lost with its process or its machine."""


def workers(address: str, plan: Plan) -> Workers:
    """Return what starts the runs of `plan` on the cluster at `address`: HOST:PORT, ray://HOST:PORT or "auto".

    Raises ConfigError where there is none, and for parts that only this process knows.
    """
    check_parts(plan.first().config(), "use `--jobs`")
    ray = connect(address)
    # A run that is lost is begun again here, where it can be told.
    task = ray.remote(num_cpus=1, max_retries=0)(work)
    here, processors = str(Path.cwd()), Processors(ray, head_of(ray, address))

    def start(run: Run) -> "Task":
        shutil.rmtree(run.directory, ignore_errors=True)  # what a run that was interrupted has left
        return Task(ray, partial(task.remote, facts_of(run), here), run, processors)

    def number() -> int:
        """Nothing is started while the head is silent."""
        known = processors()
        return 0 if processors.silent else known

    return Workers(number, start)


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
        # Ray may end this process without a word, and then gives its processor to others.
        going = start_here(run, partial(end_with_parent, signal.SIGTERM))
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


class Task:
    """A run on the cluster, as `perform` follows it; one that is lost with its process or machine is begun again.

    `submit`: gives `work` to Ray, and returns the reference to its result. `processors`: those of the cluster, which know
    whether its head answers.
    """

    def __init__(self, ray: Any, submit: Callable[[], Any], run: Run, processors: Processors) -> None:
        self._ray, self._submit, self._run, self._processors = ray, submit, run, processors
        self._reference = submit()
        self._tries = 1

    def poll(self) -> int | None:
        """Return the exit code, once the files are here. Raises RunError if the cluster is lost."""
        try:
            return self._looked_at()
        except ConnectionError as error:
            raise is_lost(error) from None

    def _looked_at(self) -> int | None:
        self._processors()
        if self._processors.silent:
            return None
        done, _ = self._ray.wait([self._reference], timeout=0)
        if not done:
            return None
        code, said, files = self._result()
        if code is None:
            if self._tries < _TRIES:
                self._tries += 1
                say(f"{describe(self._run)}: {said}; it starts anew")
                self._reference = self._submit()
                return None
            code, said, files = _BROKEN, f"{said}, {counted(_TRIES, 'time')}", b""
        self._run.directory.mkdir(parents=True, exist_ok=True)
        if files:
            with tarfile.open(fileobj=io.BytesIO(files)) as archive:
                archive.extractall(self._run.directory, filter="data")
        else:
            (self._run.directory / LOG).write_text(f"error: {said}\n", encoding="utf-8")
        return code

    def _result(self) -> tuple[int | None, str, bytes]:
        """Return the exit code, what stood in the way, and the files; no code if the run was lost on its way."""
        try:
            code, said, files = self._ray.get(self._reference)
        except self._ray.exceptions.RayTaskError as error:  # an exception of `work`, which would come again
            return _BROKEN, f"the Ray task failed ({in_one_line(getattr(error, 'cause', None) or error)})", b""
        except self._ray.exceptions.RayError as error:
            # The first sentence, behind which Ray goes on with advice.
            return None, f"the Ray task was lost ({in_one_line(error).partition('. ')[0]})", b""
        if code < 0:  # by a signal from outside, most likely for want of memory
            return None, f"its process was ended from outside by signal {-code}", b""
        return int(code), said, files

    def end(self) -> None:
        """Stop the run, if it has not ended."""
        if self._processors.silent:
            return  # Ray would wait for the head, and end this process without a word; the runs end by themselves
        with suppress(ConnectionError):
            self._ray.cancel(self._reference)
