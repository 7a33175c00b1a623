"""A real Docker engine for tests: a federation of docker-compose.yml, and single containers of its image."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from common import __version__
from server_app.history import read_history
from server_app.launch import free_port

ROOT = Path(__file__).resolve().parents[1]
IMAGE = f"quickbloom:{__version__}"
BASE_IMAGE = os.environ.get("BASE_IMAGE", "python:3.11-slim-bookworm")
# A newer client elsewhere on the PATH may lack what the engine's own has.
PATH = f"/usr/bin:{os.environ['PATH']}"
NODES = ("supernode-1", "supernode-2", "supernode-3")


class Federation:
    """The services of docker-compose.yml and `overlays` with a project name, ports and a directory of runs of their own."""

    def __init__(self, name: str, home: Path, overlays: Sequence[str] = (), **env: str) -> None:
        self.name = name
        self.runs = home / "runs"
        self.port = free_port()
        own = {"QUICKBLOOM_RUNS": str(self.runs), "QUICKBLOOM_FLEET": f"127.0.0.1:{self.port}", "PATH": PATH}
        own |= {"DOCKER_BUILDKIT": "1", "COMPOSE_DOCKER_CLI_BUILD": "1"}
        if list((ROOT / "docker" / "wheels").glob("torch-*.whl")):
            own["TORCH_INDEX"] = ""
        self.env = {**os.environ, **own, **env}
        files = [ROOT / "docker-compose.yml", *(ROOT / "docker" / f"{overlay}.yml" for overlay in overlays)]
        self._command = [*compose_command(), "-p", name, *(part for file in files for part in ("-f", str(file)))]

    def compose(self, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._command, *arguments],
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The command line in its container, going on in the background."""
        return subprocess.Popen(
            [*self._command, "run", "--rm", "-T", "cli", *arguments],
            env=self.env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    def up(self) -> None:
        up = self.compose("up", "-d")
        assert up.returncode == 0, up.stdout + up.stderr + self.compose("logs", "--no-color").stdout[-5000:]

    def containers(self, service: str) -> list[str]:
        """Ids of the living containers of a service."""
        return self.compose("ps", "-q", service).stdout.split()

    def container(self, service: str) -> str:
        (one,) = self.containers(service)
        return one

    def kill(self, service: str) -> None:
        """kill -9 of a container's main process; `docker kill` would count as a wish, after which nothing is restarted."""
        kill(self.container(service))

    def until_healthy(self, *services: str) -> None:
        """Wait until every container of these services says that it is well."""

        def healthy() -> bool:
            found = [container for service in services for container in self.containers(service)]
            return len(found) >= len(services) and all(inspect(one, "{{.State.Health.Status}}") == "healthy" for one in found)

        until(healthy, 240)

    @contextmanager
    def new_run(self) -> Iterator[Callable[[], Path]]:
        """Gives a function that waits for the directory of a run that was started since."""
        known = set(self.runs.iterdir())

        def directory() -> Path:
            until(lambda: bool(set(self.runs.iterdir()) - known), 240)
            return next(iter(set(self.runs.iterdir()) - known))

        yield directory

    def directory_of(self, summary: dict[str, Any]) -> Path:
        """A run directory on the host, from the name that it has in the containers."""
        return self.runs / Path(summary["run_dir"]).name

    def down(self) -> None:
        """Remove everything but the image and the runs."""
        self.compose("down", "--volumes", "--remove-orphans")


@contextmanager
def federation(name: str, home: Path, overlays: Sequence[str] = (), **env: str) -> Iterator[Federation]:
    """Build, start, and remove at the end. Skips the test where there is no engine."""
    needs_engine()
    it = Federation(name, home, overlays, **env)
    try:
        built = it.compose("build", "superlink")
        assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
        it.up()
        yield it
    finally:
        it.down()


def needs_engine() -> None:
    """Skip the test where there is no engine, no Compose or no base image."""
    if shutil.which("docker", path=PATH) is None or docker("info").returncode:
        pytest.skip("needs a Docker engine that answers: install one, or run `make test-docker` as root on Debian")
    if not compose_command():
        pytest.skip("needs Compose: install docker-compose")
    if docker("image", "inspect", BASE_IMAGE).returncode:
        pytest.skip(f"needs the image {BASE_IMAGE}: fetch it with `docker pull`, or run `make test-docker`")


def compose_command() -> list[str]:
    """The command of Compose, 1.29 or 2; QUICKBLOOM_COMPOSE names another program. Empty if there is none."""
    own = os.environ.get("QUICKBLOOM_COMPOSE") or shutil.which("docker-compose", path=PATH)
    if own:
        return [own]
    if shutil.which("docker", path=PATH) and docker("compose", "version").returncode == 0:
        return ["docker", "compose"]
    return []


def docker(*arguments: str | Path, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", *map(str, arguments)],
        env={**os.environ, "PATH": PATH},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        check=False,
    )


def inspect(container: str, what: str) -> str:
    return docker("inspect", "--format", what, container).stdout.strip()


def kill(container: str) -> None:
    """kill -9 of a container's main process, as if it had crashed."""
    os.kill(int(inspect(container, "{{.State.Pid}}")), signal.SIGKILL)


def rounds(directory: Path) -> int:
    """How many rounds a run has done so far."""
    return len(read_history(directory))


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(1)
