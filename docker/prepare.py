"""The one-shot services of docker-compose.yml: secrets for every container of one host, and the registration of its nodes.

prepare.py secrets NODES     CA, certificate and keys, once; every container's part into its own volume
prepare.py register          the nodes' public keys with the SuperLink
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ALL = Path("/vault/secrets")
"""Everything, on a volume that only these services see."""
PARTS = Path("/parts")
"""One volume for each container, mounted here under its name."""
APP = 49999
RUNS = Path("/app/quickbloom-runs")


def make(nodes: str) -> int:
    """Make what is missing, and hand every container its part."""
    hosts = ["superlink", "superlink-control", *os.environ.get("QUICKBLOOM_HOSTS", "").split()]
    command = ["quickbloom", "secrets", "--output", str(ALL), "--nodes", nodes, "--if-missing"]
    code = subprocess.run([*command, *(part for host in hosts for part in ("--host", host))], check=False).returncode
    if code:
        return code
    folders = {name: ALL / name for name in ("superlink", "superexec", "cli")}
    folders |= {folder.name: folder for folder in sorted((ALL / "nodes").iterdir())}
    for part in sorted(PARTS.iterdir()):
        if part.name not in folders:
            print(
                f"error: there are no secrets for '{part.name}': remove the volume `vault`, or add the node with `--add-node`"
            )
            return 2
        for file in sorted(folders[part.name].iterdir()):
            target = part / file.name
            if not target.exists() or target.read_bytes() != file.read_bytes():
                shutil.copyfile(file, target)
            target.chmod(0o400)
            os.chown(target, APP, APP)
        os.chown(part, APP, APP)
    # Made by the engine if it was not there, and then root's.
    if RUNS.is_dir() and RUNS.stat().st_uid == 0:
        os.chown(RUNS, APP, APP)
    return 0


def register() -> int:
    """Register the nodes; those that are registered stay so."""
    return subprocess.run(["quickbloom", "secrets", "--output", str(ALL), "--register", "superlink"], check=False).returncode


if __name__ == "__main__":
    sys.exit(make(sys.argv[2]) if sys.argv[1] == "secrets" else register())
