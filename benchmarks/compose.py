"""The federation of docker-compose.yml in a real Docker engine, for benchmarks and tests."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quickbloom import __version__
from quickbloom.server_app.launch.flower_run import free_port

ROOT = Path(__file__).resolve().parents[1]
IMAGE = f"quickbloom:{__version__}"
BASE_IMAGE = os.environ.get("BASE_IMAGE", "python:3.11-slim-bookworm")
# A newer client elsewhere on the PATH may lack what the engine's own has.
PATH = f"/usr/bin:{os.environ['PATH']}"
NODES = ("supernode-1", "supernode-2", "supernode-3")


class Federation:
    """The services of docker-compose.yml and `overlays`, with their own project name, ports and directory of runs.

    `overlays`: names of files in docker/, or paths.
    """

    def __init__(self, name: str, home: Path, overlays: Sequence[str | Path] = (), **env: str) -> None:
        self.name = name
        self.runs = home / "runs"
        self.port = free_port()
        own = {"QUICKBLOOM_RUNS": str(self.runs), "QUICKBLOOM_FLEET": f"127.0.0.1:{self.port}", "PATH": PATH}
        own |= {"DOCKER_BUILDKIT": "1", "COMPOSE_DOCKER_CLI_BUILD": "1"}
        if list((ROOT / "docker" / "wheels").glob("torch-*.whl")):
            own["TORCH_INDEX"] = ""
        self.env = {**os.environ, **own, **env}
        files = [ROOT / "docker-compose.yml"]
        files += [one if isinstance(one, Path) else ROOT / "docker" / f"{one}.yml" for one in overlays]
        self._command = [*compose_command(), "-p", name, *(part for file in files for part in ("-f", str(file)))]

    def compose(self, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._command, *arguments],
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            encoding="utf-8",
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )

    def start(self, *arguments: str, mounts: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start the command line in its container, in the background. `mounts`: as for `docker run -v`."""
        return subprocess.Popen(
            [*self._command, "run", "--rm", "-T", *(part for one in mounts for part in ("-v", one)), "cli", *arguments],
            env=self.env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            stdin=subprocess.DEVNULL,
        )

    def build(self) -> None:
        """Build the image of every role. Raises AssertionError with the engine's message."""
        built = self.compose("build", "superlink")
        assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]

    def up(self) -> None:
        up = self.compose("up", "-d")
        assert up.returncode == 0, up.stdout + up.stderr + self.compose("logs", "--no-color").stdout[-5000:]

    def containers(self, service: str) -> list[str]:
        """Return the ids of the running containers of a service."""
        return self.compose("ps", "-q", service).stdout.split()

    def container(self, service: str) -> str:
        (one,) = self.containers(service)
        return one

    def kill(self, service: str) -> None:
        """Send kill -9 to a container's main process; after `docker kill` the engine would not restart it."""
        kill(self.container(service))

    def until_healthy(self, *services: str) -> None:
        """Wait until every container of these services reports that it is healthy."""

        found: list[str] = []

        def healthy() -> bool:
            nonlocal found
            if len(found) < len(services) or "" in (states := [inspect(one, "{{.State.Health.Status}}") for one in found]):
                found = [container for service in services for container in self.containers(service)]
                return False
            return all(state == "healthy" for state in states)

        until(healthy, 240)

    @contextmanager
    def new_run(self) -> Iterator[Callable[[], Path]]:
        """Yield a function that waits for the directory of a run started since."""
        known = set(self.runs.iterdir())

        def directory() -> Path:
            until(lambda: bool(set(self.runs.iterdir()) - known), 240)
            return next(iter(set(self.runs.iterdir()) - known))

        yield directory

    def directory_of(self, summary: dict[str, Any]) -> Path:
        """Return the host's path of a run directory from its path in the containers."""
        return self.runs / Path(summary["run_dir"]).name

    def down(self) -> None:
        """Remove everything but the image and the runs."""
        self.compose("down", "--volumes", "--remove-orphans")


def missing() -> str | None:
    """Return in one sentence what this machine lacks for containers; None if it lacks nothing."""
    if shutil.which("docker", path=PATH) is None or docker("info").returncode:
        return "needs a Docker engine that answers: install one, or run `make test-docker` as root on Debian"
    if not compose_command():
        return "needs Compose: install docker-compose"
    if docker("image", "inspect", BASE_IMAGE).returncode:
        return f"needs the image {BASE_IMAGE}: fetch it with `docker pull`, or run `make test-docker`"
    return None


def compose_command() -> list[str]:
    """Return the command of Compose, 1.29 or 2; QUICKBLOOM_COMPOSE names another program. Empty if there is none."""
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
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        check=False,
    )


def inspect(container: str, what: str) -> str:
    return docker("inspect", "--format", what, container).stdout.strip()


def main_process(container: str) -> int:
    """Return the id, on this machine, of a container's main process."""
    return int(inspect(container, "{{.State.Pid}}"))


def kill(container: str) -> None:
    """Send kill -9 to a container's main process, as if it had crashed."""
    os.kill(main_process(container), signal.SIGKILL)


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(1)
