"""Starting a run through Flower's own command line, and finding out how it ended.

`flwr run` returns 0 whatever becomes of the run, so the truth is asked of `flwr list`. For simulations a private SuperLink is
started, which ends with the command: the one that `flwr` manages by itself outlives it, and later runs an app with the code and
the environment of the directory that it was started in.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import tomli_w
import torch

from common.config import Scalar
from common.errors import QuickbloomError

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_PACKAGES = ("common", "server_app", "client_app")


class LaunchError(QuickbloomError):
    """Flower could not be started, or did not take the run."""


def environment(flwr_home: Path | None = None) -> dict[str, str]:
    """The environment for Flower's processes: this Python's scripts first on the PATH, one thread, no telemetry."""
    scripts = str(Path(sys.executable).parent)
    extra = {"PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}", "OMP_NUM_THREADS": "1"}
    if flwr_home:
        extra["FLWR_HOME"] = str(flwr_home)
    return {**os.environ, **QUIET, **extra}


@contextmanager
def bundle() -> Iterator[Path]:
    """A directory that holds this app and nothing else, for `flwr run`; works from a checkout and from an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    template = root / "pyproject.toml"
    if not template.is_file():
        template = Path(__file__).resolve().parent / "app_template" / "pyproject.toml"
    with tempfile.TemporaryDirectory(prefix="quickbloom-") as directory:
        app = Path(directory) / "quickbloom"
        for package in _PACKAGES:
            shutil.copytree(root / package, app / package, ignore=shutil.ignore_patterns("__pycache__", "app_template"))
        shutil.copy(template, app / "pyproject.toml")
        # Hatchling is told to read a README that the bundle does not carry; Flower does not build it.
        (app / "README.md").touch()
        yield app


class LocalSuperLink:
    """A SuperLink for simulations that lives as long as this context. `name` is its connection, `home` its FLWR_HOME."""

    name = "private"

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="quickbloom-superlink-", ignore_cleanup_errors=True)
        self.home = Path(self._directory.name)

    def __enter__(self) -> "LocalSuperLink":
        port = _free_port()
        connection = {"address": f"127.0.0.1:{port}", "insecure": True}
        config = {"superlink": {"default": self.name, self.name: connection}}
        (self.home / "config.toml").write_text(tomli_w.dumps(config))
        self._log = self.home / "superlink.log"
        command = [_script("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                env=environment(self.home),
                cwd=self.home,  # neutral: Flower imports the app from here before it looks into the bundle
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while not _healthy(port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = self._log.read_text()[-2000:]
                self.__exit__(None, None, None)
                raise LaunchError(f"Flower's SuperLink did not start; it wrote: {tail}")
            time.sleep(0.1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        end_group(self._process)
        self._directory.cleanup()


class Run:
    """A run that was handed to a SuperLink. Read `lines` for its log; `finish` says how it ended."""

    def __init__(
        self, app: Path, connection: str, home: Path | None, settings: Mapping[str, Scalar], nodes: int | None
    ) -> None:
        self._env = environment(home)
        self._connection = connection
        self.run_id: str | None = None
        config = app.parent / "run-config.toml"
        config.write_text(tomli_w.dumps(nest(settings)))
        command = [_script("flwr"), "run", str(app), connection, "--stream", "--run-config", str(config)]
        if nodes is not None:
            command += ["--federation-config", _simulation(nodes)]
        self._stream = self._start(command)

    def lines(self) -> Iterator[str]:
        """The lines of the run's log as they come, without colours. Ends when the run has ended."""
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
                raise LaunchError(f"Flower did not take the run: {' '.join(' '.join(refusal).split())}")
            if self.status()[0].startswith("finished"):
                return
            # The stream broke (the SuperLink was restarted, say), the run did not.
            time.sleep(2)
            self._stream = self._start([_script("flwr"), "log", self.run_id, self._connection, "--stream"])

    def status(self) -> tuple[str, str]:
        """(status, details) as Flower has it; status is one of pending, starting, running, finished:completed, ..."""
        command = [_script("flwr"), "list", self._connection, "--run-id", str(self.run_id), "--format", "json"]
        answer = subprocess.run(command, env=self._env, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        try:
            run: dict[str, Any] = json.loads(answer.stdout)["runs"][0]
        except (ValueError, KeyError, IndexError):
            return "unknown", (answer.stdout + answer.stderr).strip()
        return str(run["status"]), str(run["status-details"])

    def stop(self) -> None:
        """Ask Flower to stop the run; the log ends soon after."""
        if self.run_id is not None:
            command = [_script("flwr"), "stop", self.run_id, self._connection]
            subprocess.run(command, env=self._env, capture_output=True, stdin=subprocess.DEVNULL, check=False, timeout=60)

    def close(self) -> None:
        """End the process that follows the log."""
        end_group(self._stream)

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        # A session of its own, so that Ctrl-C reaches this program alone, which then stops the run in order.
        return subprocess.Popen(
            command,
            env={**self._env, "PYTHONUNBUFFERED": "1", "COLUMNS": "1000"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )


def connection_exists(name: str) -> bool:
    """Whether the user's Flower configuration knows the SuperLink connection `name`."""
    path = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "config.toml"
    try:
        return name in tomllib.loads(path.read_text()).get("superlink", {})
    except (OSError, tomllib.TOMLDecodeError):
        return False


def nest(settings: Mapping[str, Scalar]) -> dict[str, Any]:
    """{"maml.inner-lr": 1} -> {"maml": {"inner-lr": 1}}, as TOML wants it."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        table, dot, name = key.rpartition(".")
        (nested.setdefault(table, {}) if dot else nested)[name] = value
    return nested


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a process and its children: ask, wait, insist. Does nothing for one that has ended."""
    for wish, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            break
        try:
            os.killpg(process.pid, wish)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    if process.stdout is not None:
        process.stdout.close()


def _simulation(nodes: int) -> str:
    config = f"num-supernodes={nodes} client-resources-num-cpus=1"
    if torch.cuda.is_available():
        # Ray hides every GPU from a node that asks for none; the nodes that compute at once share what there is.
        config += f" client-resources-num-gpus={torch.cuda.device_count() / min(nodes, os.cpu_count() or 1):.4f}"
    return config


def _script(name: str) -> str:
    """A command of Flower: the one beside this Python, else the first on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise LaunchError(f"the command `{name}` is not on the PATH: install Flower with pip install 'flwr[simulation]'")
    return found


def _without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _healthy(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
