"""Starts a run through Flower's own command line, and determines how it ended.

`flwr run` always returns 0, so `flwr list` is asked for the result. Simulations get a private
SuperLink, which ends with the command. The one that `flwr` manages by itself outlives it, and later
runs an app with the code and the environment of the directory in which it was started.
"""

import json
import math
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import tomli_w
import torch

from quickbloom.common.config.run import Scalar
from quickbloom.common.errors import QuickbloomError
from quickbloom.common.flower import callers, registry, simulation
from quickbloom.common.system import surroundings, temporary, user_code
from quickbloom.common.system.package import folders, not_sources
from quickbloom.common.system.processes import end_all_with, end_group, sessions_with, start
from quickbloom.server_app.launch.connection import trouble

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # glibc would return every activation above 32 MB to the system, and map and clear it again in the next step.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # for `compile`
}
"""Environment of processes that compute: one thread each, and freed memory is kept."""
_PATIENCE = 600  # seconds without an answer of the SuperLink
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest path of Ray's sockets below its directory for temporary files."""


class LaunchError(QuickbloomError):
    """Flower could not be started, or did not accept the run."""


def environment(flwr_home: Path | None = None, modules: Path | None = None, programs: Path | None = None) -> dict[str, str]:
    """Return the environment for Flower's processes: this Python's scripts first on the PATH, one thread, no telemetry.

    They print and read UTF-8, and reach loopback without a proxy. `modules`: a directory in which
    they look for modules last. `programs`: a directory before all others on the PATH.
    """
    path = [programs, Path(sys.executable).parent, os.environ.get("PATH", "")]
    extra = {"PATH": os.pathsep.join(str(part) for part in path if part), **CPU_ENVIRONMENT}
    if flwr_home:
        extra["FLWR_HOME"] = str(flwr_home)
    if modules:
        extra[user_code.FOLDER] = str(modules)
    return {**os.environ, **QUIET, **surroundings.for_processes(), **extra}


def _put_simulation_into(directory: Path) -> None:
    """Write our `flwr-simulation` into a directory that stands first on a PATH. Windows finds only Flower's own."""
    directory.mkdir()
    shim = directory / "flwr-simulation"
    # -P: nothing is imported from the folder of the file.
    patches = ",".join(registry.allowed(*simulation.PATCHES))
    command = f'"{sys.executable}" -P "{Path(simulation.__file__).resolve()}" "{patches}"'
    shim.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    shim.chmod(0o755)


def private_ray(secret: Path) -> dict[str, str]:
    """Return the environment in which Ray's processes, which run any code sent to them, require the file `secret`."""
    # The last one is Ray's switch for systems with intrusive firewalls: its processes listen only on loopback, not on
    # the whole network.
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(secret), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@contextmanager
def bundle() -> Iterator[Path]:
    """Yield a directory that holds only this app, for `flwr run`; works from a checkout and from an installed wheel."""
    found = folders()
    template = found["quickbloom"].parent / "pyproject.toml"
    if found["common"].parent == found["quickbloom"]:
        template = found["server_app"] / "app_template" / "pyproject.toml"
    with tempfile.TemporaryDirectory(prefix="quickbloom-") as directory:
        app = Path(directory) / "quickbloom"
        for name, folder in found.items():
            shutil.copytree(folder, app / name, ignore=shutil.ignore_patterns(*not_sources(name)))
        shutil.copy(template, app / "pyproject.toml")
        # Hatchling would read a README that the bundle does not carry; Flower does not build it.
        (app / "README.md").touch()
        yield app


class LocalSuperLink:
    """A SuperLink for simulations that lives as long as this context. `name` is its connection, `home` its FLWR_HOME.

    `modules`: the directory of a user's own model or data function, which Flower's processes search
    last.
    """

    name = "private"

    def __init__(self, modules: Path | None = None) -> None:
        self._modules = modules
        self._held = ExitStack()
        self.home = Path(
            self._held.enter_context(tempfile.TemporaryDirectory(prefix="quickbloom-superlink-", ignore_cleanup_errors=True))
        )

    def __enter__(self) -> "LocalSuperLink":
        port = free_port()
        # Ray's own files: private, in a path short enough for its sockets, and removed with this.
        base = temporary.short(temporary.LONGEST_SOCKET - len("/qb-12345678") - len(_RAY_SOCKET))
        ray = tempfile.TemporaryDirectory(prefix="qb-", dir=base, ignore_cleanup_errors=True)
        self._held.enter_context(ray)
        connection = {"address": f"127.0.0.1:{port}", "insecure": True}
        config = {"superlink": {"default": self.name, self.name: connection}}
        (self.home / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
        self._log = self.home / "superlink.log"
        token = self.home / "ray.token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        _put_simulation_into(self.home / "bin")
        command = callers.command("flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess")
        command += ["--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
        variables = environment(self.home, self._modules, programs=self.home / "bin") | private_ray(token)
        variables["RAY_TMPDIR"] = ray.name
        with self._log.open("w", encoding="utf-8") as log:
            # Its home is a neutral folder: Flower imports the app from there before it looks into the bundle.
            self._process = start(command, variables, log, self.home)
        try:
            deadline = time.monotonic() + 60
            while not healthy(port):
                if not self.alive() or time.monotonic() > deadline:
                    tail = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise LaunchError(f"Flower's SuperLink did not start; it wrote: {tail}")
                time.sleep(0.1)
        except BaseException:  # Ctrl-C as well: Python calls __exit__ only after a completed __enter__
            self.__exit__(None, None, None)
            raise
        return self

    def alive(self) -> bool:
        """Return whether the SuperLink still runs."""
        return self._process.poll() is None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ours = f"FLWR_HOME={self.home}"
        sessions = sessions_with(ours)  # while their first processes live
        end_group(self._process)
        try:
            end_all_with(ours, sessions)
        finally:
            self._held.close()


class Run:
    """A run submitted to a SuperLink: a private one with simulated `nodes`, or the user's connection of that name.

    Read `lines` for its log; `status` says how it ended.
    """

    def __init__(self, app: Path, link: LocalSuperLink | str, settings: Mapping[str, Scalar], nodes: int) -> None:
        self._link = link if isinstance(link, LocalSuperLink) else None
        self._connection = link.name if isinstance(link, LocalSuperLink) else link
        self._env = environment(self._link.home if self._link else None)
        self.run_id: str | None = None
        config = app.parent / "run-config.toml"
        config.write_text(tomli_w.dumps(nest(settings)), encoding="utf-8")
        command = [script("flwr"), "run", str(app), self._connection, "--stream", "--run-config", str(config)]
        if self._link:
            command += ["--federation-config", _simulation(nodes)]
        self._stream = self._start(command)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the run's log as they arrive, without colours, until the run has ended."""
        refusal: list[str] = []
        while True:
            assert self._stream.stdout is not None
            for line in self._stream.stdout:
                plain = _without_colours(line.rstrip("\n"))
                if self.run_id is None:
                    refusal.append(plain)
                    if "Successfully started run " in plain:
                        self.run_id = plain.split("Successfully started run ")[1].split()[0]
                yield plain
            self._stream.wait()
            if self.run_id is None:
                raise LaunchError(self._refusal(refusal))
            if self._has_ended():
                return
            # The stream broke (after a restart of the SuperLink, say), but not the run.
            self._stream = self._start([script("flwr"), "log", self.run_id, self._connection, "--stream"])

    def _refusal(self, said: list[str]) -> str:
        """Return why Flower did not accept the run; its own message on a failed connection is the same for every cause."""
        if not self._link and (reason := trouble(self._connection)):
            return reason
        return f"Flower did not take the run: {unframed(' '.join(said))}"

    def _has_ended(self) -> bool:
        """Return whether the run is over; False if Flower says that it continues. Raises LaunchError without an answer."""
        deadline = time.monotonic() + _PATIENCE
        while (status := self.status()[0]) == "unknown":
            if self._link and not self._link.alive():
                raise LaunchError("the SuperLink of this simulation has died: start the run again")
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"the SuperLink `{self._connection}` has not answered for {_PATIENCE} s; the run may still go on: "
                    f"look with `flwr list {self._connection} --run-id {self.run_id}`"
                )
            time.sleep(2)
        return status.startswith("finished")

    def status(self) -> tuple[str, str]:
        """Return (status, details) from Flower; status is one of pending, starting, running, finished:completed, ..."""
        command = [script("flwr"), "list", self._connection, "--run-id", str(self.run_id), "--format", "json"]
        answer = self._ask(command)
        try:
            run: dict[str, Any] = json.loads(answer)["runs"][0]
        except (ValueError, KeyError, IndexError):
            return "unknown", answer.strip()
        return str(run["status"]), str(run["status-details"])

    def stop(self) -> bool:
        """Ask Flower to stop the run. Return False if it is unknown whether the run was accepted."""
        if self.run_id is not None:
            self._ask([script("flwr"), "stop", self.run_id, self._connection])
        return self.run_id is not None

    def close(self) -> None:
        """End the process that follows the log."""
        end_group(self._stream)

    def _ask(self, command: list[str]) -> str:
        """Run one of Flower's commands to its end, and return what it printed; "" if it took too long."""
        asked = start(command, self._env)
        try:
            return asked.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            return ""
        finally:
            end_group(asked)

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        return start(command, {**self._env, "PYTHONUNBUFFERED": "1", "COLUMNS": "1000"})


def nest(settings: Mapping[str, Scalar]) -> dict[str, Any]:
    """Nest settings as TOML requires: {"maml.inner-lr": 1} -> {"maml": {"inner-lr": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        table, dot, name = key.rpartition(".")
        (nested.setdefault(table, {}) if dot else nested)[name] = value
    return nested


def _simulation(nodes: int) -> str:
    config = f"num-supernodes={nodes} client-resources-num-cpus=1"
    if torch.cuda.is_available():
        # Ray hides every GPU from a node that requests none; nodes that compute at the same time share the GPUs.
        share = torch.cuda.device_count() / min(nodes, os.cpu_count() or 1)
        config += f" client-resources-num-gpus={math.floor(1e4 * share) / 1e4}"
    return config


def unframed(said: str) -> str:
    """Return Flower's message in one line, without the frame around it."""
    return " ".join(re.sub("[\u2500-\u257f]+", " ", said).split())


def script(name: str) -> str:
    """Return the path of a command of Flower: beside this Python, else the first on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise LaunchError(f"the command `{name}` is not on the PATH: install Flower with pip install 'flwr[simulation]'")
    return found


def _without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def free_port() -> int:
    """Return a free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def healthy(port: int) -> bool:
    """Return whether a SuperLink answers on this HTTP port of loopback, without a proxy."""
    try:
        with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
