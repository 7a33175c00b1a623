"""A replica of docker/scale.yml, take_key.py SERVER NODES: takes a key that no other replica holds, and its part of the tasks.

Every replica sees all keys; those of the first NODES are used. Which are taken is told by locks on files that they share; a
lock ends with its process, however that ends.
"""

import fcntl
import os
import sys
from pathlib import Path

KEYS = Path("/secrets")
"""A folder for each node: node-1, node-2, .."""
DATA = Path("/app/data")
"""A volume that all replicas share."""


def take(nodes: int) -> tuple[int, int] | None:
    """(number of the node whose key is taken now, how many nodes there are), or None if all are taken."""
    names = [folder.name.removeprefix("node-") for folder in KEYS.glob("node-*")]
    numbers = sorted(int(name) for name in names if name.isdigit())[:nodes]
    (DATA / "taken").mkdir(exist_ok=True)
    for number in numbers:
        lock = os.open(DATA / "taken" / f"node-{number}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        os.set_inheritable(lock, True)  # the program that this one becomes holds it on
        return number, len(numbers)
    return None


def main(server: str, nodes: int) -> None:
    """Become the node whose key is taken; exits with 1 if there is none."""
    taken = take(nodes)
    if taken is None:
        sys.exit("error: every node's key is taken by another replica: set QUICKBLOOM_NODES to the number of replicas")
    number, nodes = taken
    print(f"this replica is node-{number} of {nodes}", flush=True)
    settings = {"partition-id": number - 1, "num-partitions": nodes, "state-dir": DATA / f"node-{number}" / "state"}
    command = ["quickbloom-edge", "join", "--server", server, "--secrets", str(KEYS / f"node-{number}")]
    os.execvp(command[0], command + [part for key, value in settings.items() for part in ("--set", f"{key}={value}")])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
