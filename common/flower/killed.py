"""A SuperExec notices at once that a worker was killed, says so, and lets another one try with fewer tasks at once.

The kernel kills by signal 9 whoever takes memory that is not there. Flower misses the process a minute later, and nobody learns
why. Here whoever started it says it on this machine, and to whoever waits for the result: to the SuperNode, which hands the
message out again (`common.flower.states.killed_workers`), or to the SuperLink, which ends the run.
"""

import importlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from logging import ERROR, WARNING, getLogger
from multiprocessing import connection, util
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from quickbloom.common.flower.states.killed_workers import AGAIN, OVER
from quickbloom.common.system import at_once

_CLIENT_APP = "flwr-clientapp"
_ENDING = 4.0  # seconds that workers have to end with their SuperExec, which Flower ends after five


class Workers:
    """The workers of a SuperExec, each a process with the command line that Flower gives it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # the exit code of a process can be read once
        self._running: set[BaseProcess] = set()
        self._owner = os.getpid()
        self._limit: int | None = None
        self._noted = Path(util.get_temp_dir(), "at-once")

    def variables(self) -> dict[str, str]:
        """Return the environment variables of the next worker beyond those of this process."""
        self._noted.unlink(missing_ok=True)
        limit = {} if self._limit is None else {at_once.LIMIT: str(self._limit)}
        return {at_once.FILE: str(self._noted), **limit}

    def start(self, process: BaseProcess, arguments: Sequence[str]) -> None:
        """Start a worker for these arguments of Flower's, and follow it in a thread."""
        with self._lock:
            process.start()
            self._running.add(process)
        threading.Thread(target=self._follow, args=(process, list(arguments)), daemon=True).start()

    def end(self) -> None:
        """End all workers in order, so that whoever waits for them learns it from them. A fork of this process ends nobody."""
        if os.getpid() != self._owner:
            return
        deadline = time.monotonic() + _ENDING
        running = list(self._running)
        for process in running:
            with suppress(ProcessLookupError):
                os.kill(cast(int, process.pid), signal.SIGTERM)
        for process in running:
            connection.wait([process.sentinel], max(0.0, deadline - time.monotonic()))

    def _follow(self, process: BaseProcess, arguments: list[str]) -> None:
        connection.wait([process.sentinel])
        with self._lock:
            process.join()
            self._running.discard(process)
        if process.exitcode == -signal.SIGKILL:
            self._report(arguments)

    def _report(self, arguments: list[str]) -> None:
        if arguments[0] != _CLIENT_APP:
            reason = "the process was killed (signal 9), most likely because memory ran out"
            getLogger("flwr").log(ERROR, "%s: %s", arguments[0], reason)
            finish(arguments, reason)
            return
        again, reason, advice = self._next()
        getLogger("flwr").log(WARNING if again else ERROR, "%s: %s", reason, advice)
        finish(arguments, f"{AGAIN if again else OVER}{reason}")

    def _next(self) -> tuple[bool, str, str]:
        """Return (whether to try again, what happened, what comes now and what the owner can do)."""
        was = at_once.noted(self._noted)
        about = f"while it computed {was} {'task' if was == 1 else 'tasks'} at once" if was else "before it computed anything"
        reason = f"this node's worker was killed (signal 9) {about}, most likely because memory ran out"
        if was == 1 or (was == 0 and self._limit == 1):
            self._limit = 1
            return False, reason, "this round goes on without the node; give it more memory, or the run a smaller model"
        self._limit = max(1, was // 2)
        now = "one task" if self._limit == 1 else f"{self._limit} tasks"
        return True, reason, f"trying again with {now} at once; `--chunk-size {self._limit}` keeps it so after a restart"


def finish(arguments: Sequence[str], details: str) -> None:
    """Finish the task of a worker that cannot do so itself, as failed. `arguments`: its command line."""
    runtime: Any = importlib.import_module("flwr.supercore.runtime")
    interceptors: Any = importlib.import_module("flwr.supercore.interceptors")
    messages: Any = importlib.import_module("flwr.proto.runtime_pb2")
    status: Any = importlib.import_module("flwr.common.constant").SubStatus
    certificates = _after(arguments, "--root-certificates")
    try:
        client = runtime.RuntimeHttpClient.from_server_address(
            server_address=arguments[2],
            insecure="--insecure" in arguments,
            root_certificates=Path(certificates).read_bytes() if certificates else None,
            interceptors=[
                interceptors.RuntimeVersionHttpInterceptor(component_name=arguments[0]),
                interceptors.RuntimeTokenHttpInterceptor(_after(arguments, "--token")),
            ],
        )
        with closing(client):
            client.PushTaskOutput(messages.PushTaskOutputRequest(sub_status=status.FAILED, details=details))
    except Exception as error:  # Flower will miss the worker after a minute
        getLogger("flwr").log(WARNING, "The task of the killed process could not be finished: %s", error)


def _after(arguments: Sequence[str], option: str) -> str:
    return arguments[arguments.index(option) + 1] if option in arguments else ""
