"""A federation of docker-compose.yml from the outside: what is up, its backup, and its restoration.

Thin over Compose: what it does stands in docs/deployment.md as well, command by command.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

from quickbloom.common.errors import ConfigError, QuickbloomError
from quickbloom.common.system.whole_files import new, replacing
from quickbloom.server_app.deployment import archive

FILE = "docker-compose.yml"
VERSION = "QUICKBLOOM_VERSION"
"""Variable with the release of the image, in the environment or in the file .env."""
_ALIVE = ("running", "restarting", "paused")
"""States of a container that may write."""


class ComposeError(QuickbloomError):
    """Compose did not do what it was asked for. The text says what it said."""


class Compose:
    """Compose in the folder of a docker-compose.yml."""

    def __init__(self, folder: Path, version: str | None = None) -> None:
        """`version`: release of the image, in place of the one in use. Raises ConfigError without such a file or Compose."""
        if not (folder / FILE).is_file():
            raise ConfigError(f"`--folder` must be a directory with {FILE}, got '{folder}'")
        self.folder = folder
        self._command = _command()
        self._environment = {**os.environ, VERSION: version} if version else None

    def run(self, *arguments: str, stdin: BinaryIO | int = subprocess.DEVNULL, stdout: BinaryIO | int = subprocess.PIPE) -> str:
        """Return what a command prints, unless that goes elsewhere. Raises ComposeError if it fails."""
        return self._done([*self._command, *arguments], stdin, stdout)

    def containers(self) -> list[dict[str, object]]:
        """What the engine says of the project's containers, also of those that have ended."""
        found = self.run("ps", "-a", "-q").split()
        if not found:
            return []
        said: list[dict[str, object]] = json.loads(self._done(["docker", "inspect", *found]))
        return said

    def has_image(self, name: str) -> bool:
        """Whether the engine has an image."""
        try:
            self._done(["docker", "image", "inspect", name])
        except ComposeError:
            return False
        return True

    def _done(self, command: Sequence[str], stdin: BinaryIO | int = subprocess.DEVNULL, out: BinaryIO | int = -1) -> str:
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=self._environment, stdin=stdin, stdout=out, stderr=subprocess.PIPE, check=False
            )
        except OSError as error:
            raise ComposeError(f"`{command[0]}` cannot be started ({error.strerror}): install Docker and Compose") from None
        if done.returncode != 0:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
            raise ComposeError(f"`{' '.join(command[:4])}` failed with exit code {done.returncode}, and said: {last[0]}")
        return done.stdout.decode(errors="replace") if done.stdout else ""


def status(compose: Compose) -> Iterator[str]:
    """Say what is up, a sentence for each container; the last one says whether runs can be started."""
    well = set()
    for container in sorted(compose.containers(), key=service_of):
        state = _part(container, "State")
        what, health = state_of(container)
        service = service_of(container)
        if what == "running" and health in ("", "healthy"):
            well.add(service)
            yield f"{service} is up{' and healthy' if health else ''}, since {str(state.get('StartedAt'))[:19]} UTC."
        elif what == "running":
            yield f"{service} {'is up, but not healthy' if health == 'unhealthy' else 'is starting'}."
        elif what == "exited" and state.get("ExitCode") == 0:
            yield f"{service} has ended, as it should where it has something to do once."
        else:
            yield f"{service} is {what}, with exit code {state.get('ExitCode')}: `docker compose logs {service}` says why."
    lacking = [service for service in ("superlink", "superexec") if service not in well]
    if lacking:
        yield f"No run can be started: {' and '.join(lacking)} must be up; `docker compose up -d` starts the federation."
    else:
        nodes = len([service for service in well if service.startswith("supernode")])
        yield f"Runs can be started; {nodes} node{'s' if nodes != 1 else ''} of this host {'are' if nodes != 1 else 'is'} up."


def is_up(compose: Compose, service: str) -> bool:
    """Whether a container of a service runs, and is well as far as that is known."""
    found = [state_of(one) for one in compose.containers() if service_of(one) == service]
    return any(what == "running" and health in ("", "healthy") for what, health in found)


def backup(compose: Compose, file: Path) -> dict[str, str]:
    """Write the backup of a server into `file`, for its owner alone; the SuperLink is stopped meanwhile, and runs wait for it.

    Returns what made it. Raises ConfigError if there is a file already, ComposeError if Compose fails; then no file is left.
    """
    if os.path.lexists(file):
        raise ConfigError(f"ARCHIVE must be a file that does not exist yet, and '{file}' does: choose another name")
    up = any(service_of(one) == "superlink" and state_of(one)[0] in _ALIVE for one in compose.containers())
    try:
        with replacing(file, file.with_name(f".{file.name}.partial"), mode=0o600, wait=True) as partial, ExitStack() as after:
            with os.fdopen(new(partial, 0o600), "wb") as out:
                if up:
                    after.callback(compose.run, "start", "superlink")
                    compose.run("stop", "superlink")
                compose.run("run", "--rm", "-T", "backup", stdout=out)
            return archive.check(partial)
    except OSError as error:
        raise ConfigError(f"ARCHIVE must be a file that can be written, got '{file}' ({error.strerror or error})") from None


def restore(compose: Compose, file: Path) -> dict[str, str]:
    """Put a backup back, where no server is yet. Returns what made it. Raises ConfigError or ComposeError."""
    facts = archive.check(file)
    if any(_part(one, "State").get("Status") in _ALIVE for one in compose.containers()):
        raise ConfigError("the federation is up, and a backup is put back where none is: run `docker compose down --volumes`")
    with file.open("rb") as content:
        compose.run("run", "--rm", "-T", "restore", stdin=content)
    return facts


def _command() -> list[str]:
    """Compose, version 2 or else docker-compose. Raises ConfigError if there is neither."""
    with suppress(OSError):
        done = subprocess.run(["docker", "compose", "version"], capture_output=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode == 0:
            return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    raise ConfigError("`quickbloom deploy` needs Compose, and there is none here: install Docker's plugin, or docker-compose")


def state_of(container: dict[str, object]) -> tuple[str, str]:
    """Return what a container does, such as "running", and its health; "" if nobody looks after that."""
    state = _part(container, "State")
    return str(state.get("Status")), str(_part(state, "Health").get("Status", ""))


def image_of(container: dict[str, object]) -> str:
    """Return the name of a container's image, such as quickbloom:0.2.0."""
    return str(_part(container, "Config").get("Image", ""))


def service_of(container: dict[str, object]) -> str:
    """Return the service that a container is of."""
    labels = _part(_part(container, "Config"), "Labels")
    return str(labels.get("com.docker.compose.service", "?"))


def _part(of: dict[str, object], name: str) -> dict[str, object]:
    part = of.get(name)
    return part if isinstance(part, dict) else {}
