"""The one-shot services of docker-compose.yml: secrets for every container of one host, registration of its nodes, backup.

prepare.py secrets NODES     CA, certificate and keys, once; every container's part into its own volume
prepare.py register          the nodes' public keys with the SuperLink
prepare.py pack              the backup, on stdout: what can't be made again
prepare.py unpack            the backup, from stdin, into empty volumes
prepare.py fits              whether this image can open the SuperLink's database, and what its nodes speak, as JSON
prepare.py nodes             what the SuperLink says of its nodes, as JSON
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ALL = Path("/vault/secrets")
"""Everything, on a volume that only these services see."""
PUBLIC = Path("/vault/public")
"""What of it is no secret: the CA's certificate, and the nodes' public keys."""
PARTS = Path("/parts")
"""One volume for each container, mounted here under its name; `nodes` is for containers that take any node's key."""
SHOWN = Path("/public")
"""PUBLIC, where it is registered from."""
APP = 49999
RUNS = Path("/app/quickbloom-runs")
BACKUP = Path("/backup")
"""The volumes of keys and database, mounted here as `vault` and `state`."""


def make(nodes: int) -> int:
    """Make what is missing, and hand every container its part."""
    hosts = ["superlink", "superlink-control", *os.environ.get("QUICKBLOOM_HOSTS", "").split()]
    code = _secrets("--nodes", str(nodes), "--if-missing", *(part for host in hosts for part in ("--host", host)))
    names = [f"node-{number}" for number in range(1, nodes + 1)]
    if not code and (new := [name for name in names if not (ALL / "nodes" / name).exists()]):
        code = _secrets(*(part for name in new for part in ("--add-node", name)))
    if code:
        return code
    publish()
    folders = {"public": PUBLIC, **{name: ALL / name for name in ("superlink", "superexec", "cli", "nodes")}}
    folders |= {folder.name: folder for folder in sorted((ALL / "nodes").iterdir())}
    for part in sorted(PARTS.iterdir()):
        if part.name not in folders and (PARTS / "nodes").is_dir():
            continue  # of docker-compose.yml, which docker/scale.yml does not start
        if part.name not in folders:
            add = f"quickbloom secrets --output {ALL} --add-node {part.name}"
            print(f"error: there are no secrets for '{part.name}': add it with `docker compose run --rm secrets {add}`")
            return 2
        hand_over(folders[part.name], part)
    # Made by the engine if it was not there, and then root's.
    if RUNS.is_dir() and RUNS.stat().st_uid == 0:
        os.chown(RUNS, APP, APP)
    return 0


def publish() -> None:
    """Write PUBLIC anew, in the form of ALL."""
    shutil.rmtree(PUBLIC, ignore_errors=True)
    (PUBLIC / "superlink").mkdir(parents=True)
    for file in (ALL / "cli" / "ca.crt", *(ALL / "nodes").glob("*/node.key.pub")):
        copy = PUBLIC / file.relative_to(ALL)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def hand_over(source: Path, target: Path) -> None:
    """Give the containers' user a copy of the files in `source`, and take away what is no longer there."""
    os.chown(target, APP, APP)
    for old in target.iterdir():
        if not (source / old.name).exists():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for entry in sorted(source.iterdir()):
        copy = target / entry.name
        if entry.is_dir():
            copy.mkdir(mode=0o500, exist_ok=True)
            hand_over(entry, copy)
            continue
        if not copy.exists() or copy.read_bytes() != entry.read_bytes():
            shutil.copyfile(entry, copy)
        copy.chmod(0o400)
        os.chown(copy, APP, APP)


def register() -> int:
    """Register the nodes; those that are registered stay so."""
    return _secrets("--register", "superlink", folder=SHOWN)


def _secrets(*arguments: str, folder: Path = ALL) -> int:
    return subprocess.run(["quickbloom", "secrets", "--output", str(folder), *arguments], check=False).returncode


def pack() -> int:
    """Write the backup to stdout."""
    from quickbloom.server_app.deployment import archive

    return _told(lambda: archive.pack(BACKUP, sys.stdout.buffer))


def unpack() -> int:
    """Put the backup on stdin back; the database becomes that of the containers' user."""
    from quickbloom.server_app.deployment import archive

    def put_back() -> None:
        with tempfile.NamedTemporaryFile() as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
            file.flush()
            archive.unpack(Path(file.name), BACKUP)
        for path in ((BACKUP / "state"), *(BACKUP / "state").rglob("*")):
            os.chown(path, APP, APP)

    return _told(put_back)


def fits() -> int:
    """Print what this image's Flower is; an error if it cannot open the database."""
    from quickbloom.common.flower import registry, transport
    from quickbloom.common.flower.states import later_release

    def look() -> None:
        later_release.check(BACKUP / "state" / "superlink.db")
        print(json.dumps({"flower": registry.version(), "speaks": transport.spoken()}))

    return _told(look)


def nodes() -> int:
    """Print what the SuperLink says of its nodes."""
    from quickbloom.server_app.deployment.registration import listed

    return _told(lambda: print(json.dumps(listed("superlink"))))


def _told(work: Callable[[], None]) -> int:
    """Do it; what goes wrong is said in one sentence."""
    from quickbloom.common.errors import QuickbloomError

    try:
        work()
    except (QuickbloomError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main(action: str, *arguments: str) -> int:
    """Do what one of the services does; returns its exit code."""
    actions = {"register": register, "pack": pack, "unpack": unpack, "fits": fits, "nodes": nodes}
    return make(int(arguments[0])) if action == "secrets" else actions[action]()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
