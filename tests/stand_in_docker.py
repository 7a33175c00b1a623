"""A program in place of Docker: it keeps containers in a file, and runs docker/prepare.py itself."""

import json
import os
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from quickbloom.server_app.deployment.secrets import create

ROOT = Path(__file__).resolve().parents[1]
DOCKER = f"""#!{sys.executable}
import json, os, runpy, shutil, subprocess, sys, time
from pathlib import Path
here = Path(__file__).parents[1]
words = [word for word in sys.argv[1:] if not word.startswith("-")]
with (here / "log").open("a") as log:
    print(*words, file=log)
containers = json.loads((here / "containers.json").read_text())
world = json.loads((here / "world.json").read_text())
def save():
    (here / "containers.json").write_text(json.dumps(containers))
    (here / "world.json").write_text(json.dumps(world))
def service(one):
    return one["Config"]["Labels"]["com.docker.compose.service"]
def settings():
    env = here / ".env"
    found = dict(line.split("=", 1) for line in env.read_text().splitlines()) if env.exists() else {{}}
    return found | os.environ
def prepare(action, **more):
    program = runpy.run_path({str(ROOT / "docker" / "prepare.py")!r})
    program["main"].__globals__.update(BACKUP=here / "volumes", APP=os.getuid(), **more)
    sys.exit(program["main"](*action))
match words:
    case ["compose", "ps", *services]:
        print(*(str(at) for at, one in enumerate(containers) if service(one) in (services or [service(one)])))
    case ["inspect", *ids]:
        print(json.dumps([containers[int(one)] for one in ids]))
    case ["image", "inspect", name]:
        sys.exit(name not in world["images"])
    case ["compose", "stop" | "start" as action, "superlink"]:
        containers[0]["State"]["Status"] = {{"stop": "exited", "start": "running"}}[action]
        save()
    case ["compose", "up", *services]:
        for one in containers:
            if service(one) in services:
                one["Config"]["Image"] = "quickbloom:" + settings().get("QUICKBLOOM_VERSION", "0.2.0")
                one["State"]["Status"] = "exited" if service(one) in world["broken"] else "running"
                node = world["nodes"].get(service(one), {{}})
                if node:
                    node["activated"] = str(time.time())
                    node["status"] = "offline" if service(one) in world["lost"] else "online"
        save()
    case ["compose", "run", "register", "python", _, "nodes"]:
        for name, node in world["nodes"].items():
            if name in world["silent"]:
                continue
            node["until"] = str(time.time() + 60)
        save()
        print("Creating container ..", file=sys.stderr)
        print(json.dumps(list(world["nodes"].values())))
    case ["compose", "run", "cli", "flwr", "list", *_]:
        print(json.dumps({{"success": True, "runs": world["runs"]}}))
    case ["compose", "exec", "superlink", "python", code]:
        if "ssl" not in code:
            print(world["flower"])
        elif not (here / "shown").exists():
            sys.exit("connection refused")
        else:
            print((here / "shown").read_text(), (here / "volumes/vault/secrets/cli/ca.crt").read_text(), sep="\\n\\n")
    case ["compose", "run", "secrets", "quickbloom", "secrets", "/vault/secrets", *hosts]:
        command = [sys.executable, "-m", "quickbloom.server_app.cli.main", "secrets", "--renew-server"]
        command += [part for host in hosts for part in ("--host", host)]
        sys.exit(subprocess.call([*command, "--output", here / "volumes/vault/secrets"], stdout=sys.stderr))
    case ["compose", "run", "secrets"] if world["stubborn"]:
        pass
    case ["compose", "run", "secrets"] | ["compose", "restart", "superlink"]:
        shutil.copy(here / "volumes/vault/secrets/superlink/server.crt", here / "shown")
    case ["compose", "run", "backup", "python", _, "fits"]:
        prepare(["fits"])
    case ["compose", "run", "backup" | "restore" as name]:
        prepare([{{"backup": "pack", "restore": "unpack"}}[name]])
    case ["compose", "version"]:
        pass
    case _:
        sys.exit(f"not known: {{words}}")
"""


def container(service: str, state: str = "running", health: str = "", code: int = 0) -> dict[str, Any]:
    """What Docker says of one."""
    found: dict[str, Any] = {"Status": state, "ExitCode": code, "StartedAt": "2026-01-02T03:04:05.678Z"}
    if health:
        found["Health"] = {"Status": health}
    return {"Config": {"Image": "quickbloom:0.2.0", "Labels": {"com.docker.compose.service": service}}, "State": found}


UP = [
    container("superlink", health="healthy"),
    container("superexec", health="healthy"),
    container("register", "exited"),
    container("supernode-1", health="healthy"),
]


class Engine:
    """The stand-in for Docker, in `folder`, with its volumes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.volumes = folder, folder / "volumes"
        (folder / "bin").mkdir()
        (folder / "bin" / "docker").write_text(DOCKER)
        (folder / "bin" / "docker").chmod(0o755)
        (folder / "docker-compose.yml").touch()
        self.has(UP)
        self.world()

    def has(self, containers: list[dict[str, Any]]) -> None:
        (self.folder / "containers.json").write_text(json.dumps(containers))

    def world(self, **changes: Any) -> None:
        """What is around the containers: images, runs, the SuperLink's nodes, what will not start or connect."""
        known: dict[str, Any] = {"images": [], "runs": [], "nodes": {}, "broken": [], "lost": [], "silent": []}
        known |= {"flower": "1.39.0", "stubborn": False}
        (self.folder / "world.json").write_text(json.dumps(known | changes))

    def images(self) -> dict[str, str]:
        """The image of every service that has a container."""
        found = json.loads((self.folder / "containers.json").read_text())
        return {one["Config"]["Labels"]["com.docker.compose.service"]: one["Config"]["Image"] for one in found}

    def done(self) -> list[str]:
        """What it was asked for, besides questions."""
        questions = ("inspect", "image inspect", "compose ps", "compose version", "compose exec", "compose run cli flwr list")
        lines = (self.folder / "log").read_text().splitlines()
        return [line for line in lines if not line.startswith(questions) and not line.endswith((" nodes", " fits"))]

    def serve(self, change: str, days: int = 365) -> None:
        """Have a server in the volumes: a database whose tables were changed last by that, a certificate for so many days."""
        create(self.volumes / "vault" / "secrets", ["node-1"], [], days)
        shutil.copy(self.volumes / "vault/secrets/superlink/server.crt", self.folder / "shown")
        (self.volumes / "state").mkdir()
        with closing(sqlite3.connect(self.volumes / "state" / "superlink.db")) as connection, connection:
            connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
            connection.execute("INSERT INTO alembic_version VALUES (?)", (change,))

    def use(self, monkeypatch: Any) -> None:
        """Be the Docker of this test, in its folder."""
        monkeypatch.setenv("PATH", f"{self.folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.delenv("QUICKBLOOM_VERSION", raising=False)
        monkeypatch.chdir(self.folder)
