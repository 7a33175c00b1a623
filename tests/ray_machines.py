"""A Ray cluster for tests, of machines that are all this one."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from quickbloom.common.system.processes import end_all_with, processes_with


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Cluster:
    """A cluster of machines that are all this one, with a processor each; `address` is that of its head."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(dir="/tmp")  # short: it holds sockets, whose paths may have 107 characters
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.head = self._start(
            "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false"
        )
        self._wait(lambda: listens(port))
        self.other = self._start("--block", f"--address={self.address}", "--node-ip-address=127.0.0.1")

    def _start(self, *options: str) -> str:
        mark = f"QUICKBLOOM_TEST_RAY={os.getpid()}-{time.monotonic_ns()}"
        name, _, value = mark.partition("=")
        environment = {
            **os.environ,
            name: value,
            "RAY_USAGE_STATS_ENABLED": "0",
            # Else the address stays behind in /tmp/ray, and every simulation on this machine waits for a cluster that is gone.
            "RAY_TMPDIR": self._folder,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        program = Path(sys.executable).parent / "ray"
        usual = ["--num-cpus=1", "--disable-usage-stats", "--object-store-memory=100000000"]
        self._started[mark] = subprocess.Popen(
            [program, "start", *options, *usual],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return mark

    def _wait(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not there() and time.monotonic() < deadline:
            assert all(one.poll() is None for one in self._started.values())
            time.sleep(0.2)

    def runs(self, mark: str) -> list[int]:
        """The processes of a comparison's runs on a machine."""
        return [pid for pid in processes_with(mark) if b"--runtime" in arguments(pid)]

    def actors(self, mark: str) -> list[int]:
        """The processes of a run's nodes on a machine."""
        return [pid for pid in processes_with(mark) if arguments(pid)[0].startswith(b"ray::ComputesNodes")]

    def run_on(self, mark: str) -> int:
        """The process of the run that is at work on a machine, as soon as there is one."""
        deadline = time.monotonic() + 90
        while not (found := self.runs(mark)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return found[0]

    def lose(self, mark: str) -> None:
        """Let a machine be gone, as far as Ray can see."""
        for pid in processes_with(mark):
            if b"raylet" in arguments(pid)[0]:
                os.kill(pid, signal.SIGKILL)

    def lose_head(self) -> None:
        """Let what every machine of the cluster asks be gone."""
        for pid in processes_with(self.head):
            if arguments(pid)[0].endswith(b"gcs_server"):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        for mark, started in self._started.items():
            end_all_with(mark, [started.pid])
            started.wait()
        assert not any(processes_with(mark) for mark in self._started)


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def arguments(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return [b""]


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not met() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert met()
