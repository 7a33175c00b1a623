"""The rolling upgrade of a federation in containers: `quickbloom deploy upgrade`.

SuperLink and SuperExec go first, and together: Flower refuses a SuperExec of another release, its nodes only warn, and its
database goes forward alone. Then the nodes, one service at a time, each of which must be connected again before the next.
Nothing is said in .env before all are: until then `docker compose up` goes back.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quickbloom.common.errors import ConfigError
from quickbloom.common.system.whole_files import whole
from quickbloom.server_app.deployment.compose import (
    VERSION,
    Compose,
    ComposeError,
    backup,
    image_of,
    service_of,
    state_of,
)

SERVER = ("superlink", "superexec")
_NODES = "supernode"
_ONCE = ("secrets", "register", "backup", "restore", "cli")
_PREPARE = ("python", "/opt/quickbloom/prepare.py")
_HTTP_FROM = (1, 40)
"""Release of Flower from which nodes speak HTTP."""


@dataclass(frozen=True)
class Plan:
    """What is upgraded, in this order: the server, each service of nodes, what else runs."""

    before: str
    """Release of the image in use."""
    after: str
    flower: tuple[str, str]
    """Releases of Flower before and after."""
    nodes: tuple[str, ...]
    """Services of nodes."""
    containers: int
    """Containers of these services, which must all be connected."""
    others: tuple[str, ...]
    archive: Path

    def lines(self) -> Iterator[str]:
        """Say it, a sentence for each step."""
        named = " to ".join(dict.fromkeys(self.flower))
        yield f"Upgrade of {self.before} to {self.after} (Flower {named}):"
        yield f"  1. back up keys and database into {self.archive}"
        yield f"  2. {' and '.join(SERVER)}, together; nodes wait"
        for number, service in enumerate(self.nodes, 3):
            yield f"  {number}. {service}, until it is connected again"
        number = 3 + len(self.nodes)
        if self.others:
            yield f"  {number}. {', '.join(self.others)}"
            number += 1
        yield f"  {number}. write {VERSION}={self.after} into .env"


def plan(folder: Path, version: str, archive: Path | None, *, anyway: bool = False) -> Plan:
    """Look at the federation of `folder` and at the image of `version`; nothing is changed.

    `archive`: file of the backup; None: a new name in `folder`. `anyway`: although runs go on. Raises ConfigError or
    ComposeError if it cannot or should not be upgraded.
    """
    old, new = Compose(folder), Compose(folder, version)
    if VERSION in os.environ:
        raise ConfigError(f"`{VERSION}` is set in this shell, where it is lost one day: write it into .env alone, and unset it")
    up = [one for one in old.containers() if state_of(one)[0] == "running"]
    services = sorted({service_of(one) for one in up}, key=_in_order)
    if lacking := [name for name in SERVER if not any(service_of(one) == name and _is_well(one) for one in up)]:
        raise ConfigError(
            f"{' and '.join(lacking)} must be up to be upgraded in turn: `quickbloom deploy status` says more; where all are "
            f"down, write {VERSION}={version} into .env and start them with docker compose up -d"
        )
    name = image_of(next(one for one in up if service_of(one) == "superlink"))
    image = f"{name.rpartition(':')[0]}:{version}"
    if not new.has_image(image):
        raise ConfigError(
            f"VERSION must be one whose image is here, and there is no {image}: build it in a checkout of that release with "
            "docker compose build superlink, or fetch it with docker pull"
        )
    flower = old.run(
        "exec", "-T", "superlink", "python", "-c", "import importlib.metadata as m; print(m.version('flwr'))"
    ).strip()
    later = _of_image(new, version)
    if (_release(flower) < _HTTP_FROM) != (_release(later) < _HTTP_FROM):
        raise ConfigError(
            f"nodes of Flower {flower} and of {later} speak different protocols, so they cannot be upgraded in turn: after a "
            f"backup, stop all with docker compose down, take docker-compose.yml of {version}, and start all, devices too"
        )
    if not anyway and (going := _going_on(old)):
        raise ConfigError(
            f"{'runs' if len(going) > 1 else 'the run'} {', '.join(going)} would end, because its server is upgraded as well: "
            "wait, or give `--anyway` and go on with `quickbloom run --resume`"
        )
    nodes = tuple(service for service in services if service.startswith(_NODES))
    others = tuple(service for service in services if service not in (*SERVER, *nodes, *_ONCE))
    count = sum(service_of(one) in nodes for one in up)
    archive = archive or folder / f"before-{version}-{datetime.now(UTC):%Y%m%d-%H%M%S}.tgz"
    return Plan(name.rpartition(":")[2], version, (flower, later), nodes, count, others, archive)


def carry_out(folder: Path, steps: Plan, patience: float, pause: float = 3.0) -> Iterator[str]:
    """Do it, and say each step once it is done. `patience`: seconds for every step; `pause`: between two looks.

    Raises ComposeError at the first step that fails, with what to do; ConfigError if the backup cannot be written.
    """
    old, new = Compose(folder), Compose(folder, steps.after)
    backup(old, steps.archive)
    yield f"Backed up into {steps.archive}: keep it as you keep the keys."
    touched: list[str] = []

    def replace(services: Sequence[str], well: Callable[[], bool], wanted: str) -> None:
        touched.extend(services)
        try:
            new.run("up", "-d", "--no-deps", *services)
            _until(well, patience, pause, wanted)
        except ComposeError as error:
            raise ComposeError(f"{error}. {_back(steps, touched, services)}") from None

    replace(SERVER, lambda: _all_well(new, SERVER), f"{' and '.join(SERVER)} are not healthy")
    watch = _Watch(new)
    if steps.containers:
        try:
            _until(lambda: watch.heard() >= steps.containers, patience, pause, "not all nodes are connected again")
        except ComposeError as error:
            raise ComposeError(f"{error}. {_back(steps, touched, SERVER)}") from None
    yield f"{' and '.join(SERVER)}: {steps.after}, and {steps.containers} nodes are connected."
    for service in steps.nodes:
        watch.begin()
        ours = len(new.run("ps", "-q", service).split())
        replace([service], lambda ours=ours: watch.new() >= ours, f"{service} is not connected again")  # type: ignore[misc]
        yield f"{service}: {steps.after}, and connected."
    if steps.others:
        replace(steps.others, lambda: _all_well(new, steps.others), f"{', '.join(steps.others)} are not healthy")
        yield f"{', '.join(steps.others)}: {steps.after}."
    _remember(folder / ".env", steps.after)
    yield f"All are {steps.after}, and .env says so. Devices elsewhere are upgraded by their owners, one at a time as well."


class _Watch:
    """Nodes as the SuperLink sees them, against an earlier look."""

    def __init__(self, compose: Compose) -> None:
        self._compose = compose
        self.begin()

    def begin(self) -> None:
        """Count from here."""
        self._first = self._look()

    def heard(self) -> int:
        """Number of nodes that have been heard since. A SuperLink that has restarted calls those online that were."""
        return sum(self._is_later(node, "until") or self._is_later(node, "activated") for node in self._look().items())

    def new(self) -> int:
        """Number of nodes that have connected since."""
        return sum(self._is_later(node, "activated") for node in self._look().items())

    def _is_later(self, node: tuple[str, dict[str, str]], field: str) -> bool:
        name, found = node
        return found["status"] == "online" and moment(found[field]) > moment(self._first.get(name, {}).get(field, ""))

    def _look(self) -> dict[str, dict[str, str]]:
        said = self._compose.run("run", "--rm", "-T", "--no-deps", "register", *_PREPARE, "nodes")
        return {str(node["id"]): node for node in _json(said, "the nodes of the SuperLink")}


def _of_image(new: Compose, version: str) -> str:
    """Return the release of Flower in the image of `version`. Raises ConfigError if that cannot open the database."""
    try:
        said = new.run("run", "--rm", "-T", "--no-deps", "backup", *_PREPARE, "fits")
    except ComposeError as error:
        why = f"the image says: {str(error).partition('said: ')[2] or error}"
        if "KeyError" in str(error):
            why = "its image is of a release that cannot say whether it opens this database"
        raise ConfigError(f"VERSION {version} is refused, {why}; nothing was changed") from None
    return str(_json(said, f"the image of {version}")["flower"])


def _going_on(old: Compose) -> list[str]:
    """Return the ids of the runs that have not ended."""
    said = old.run("run", "--rm", "-T", "--no-deps", "cli", "flwr", "list", "superlink", "--format", "json")
    found = _json(said, "the runs of the SuperLink")
    if not isinstance(found, dict) or not isinstance(runs := found.get("runs"), list):
        raise ComposeError("the SuperLink does not say which runs go on: `docker compose logs superlink` says why")
    return [str(run.get("run-id")) for run in runs if not str(run.get("status")).startswith("finished")]


def _json(said: str, what: str) -> Any:
    """Read JSON after whatever else a command printed."""
    starts = [at for at, sign in enumerate(said) if sign in "[{"]
    for start in starts[:100]:
        try:
            return json.loads(said[start:])
        except ValueError:
            continue
    raise ComposeError(f"{what} cannot be read, the answer is no JSON: {said.strip()[:200]!r}")


def _until(holds: Callable[[], bool], patience: float, pause: float, otherwise: str) -> None:
    deadline = time.monotonic() + patience
    while not holds():
        if time.monotonic() > deadline:
            raise ComposeError(f"{otherwise} after {patience:.0f} s")
        time.sleep(pause)


def _all_well(compose: Compose, services: Sequence[str]) -> bool:
    found = [one for one in compose.containers() if service_of(one) in services]
    return {service_of(one) for one in found} == set(services) and all(_is_well(one) for one in found)


def _is_well(container: dict[str, object]) -> bool:
    what, health = state_of(container)
    return what == "running" and health in ("", "healthy")


def _back(steps: Plan, touched: Sequence[str], failed: Sequence[str]) -> str:
    """Say how to go back after a failure."""
    said = (
        f"The upgrade stops here: docker compose logs {' '.join(failed)} says why; .env is as it was, so "
        f"`docker compose up -d --no-deps {' '.join(touched)}` goes back to {steps.before}"
    )
    if steps.flower[0] != steps.flower[1]:
        said += (
            f"; if its SuperLink then refuses the database, docker compose down --volumes and `quickbloom deploy restore "
            f"{steps.archive}` put the backup back, without what nodes of this host keep"
        )
    return said


def _remember(file: Path, version: str) -> None:
    """Write the release into .env, whose other lines stay."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    kept = [line for line in lines if line.partition("=")[0].strip() != VERSION]
    with whole(file) as text:
        text.write("\n".join([*kept, f"{VERSION}={version}", ""]))


def _in_order(service: str) -> tuple[str, int, str]:
    name, _, number = service.rpartition("-")
    return (name, int(number), "") if number.isdigit() else (service, 0, "")


def moment(text: str) -> float:
    """Return a time of the SuperLink in seconds; 0 where it has none. It writes ISO 8601, or seconds."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
