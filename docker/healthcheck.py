"""Exit code 0 if this container does its work: healthcheck.py superlink [HOST:PORT] | superexec | supernode | join | monitor.

`join` is said of a node that lives, also while it waits for its server; `supernode` of one that works. Uses the standard
library alone.
"""

import ssl
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path


def answers(url: str) -> bool:
    """Whether a SuperLink or SuperNode says there that it is well."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]  # it is on this host or its network
    if url.startswith("https"):
        handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile="/secrets/ca.crt")))
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=3) as answer:
            return bool(answer.status == 200)
    except OSError as error:
        print(f"{url} does not answer: {error}")
        return False


def runs(program: str) -> bool:
    """Whether a process of that name is alive."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if program.encode() in (entry / "cmdline").read_bytes():
                return True
        except OSError:
            continue
    print(f"{program} does not run")
    return False


SUPERLINK = "superlink-control:8000"
"""The name is in the certificate, and resolves to the network on which docker-compose.yml serves this port."""
CHECKS: dict[str, Callable[..., bool]] = {
    "superlink": lambda address=SUPERLINK: answers(f"https://{address}/health"),
    "superexec": lambda: runs("flower-superexec"),
    "supernode": lambda: answers("http://127.0.0.1:9094/health"),
    "join": lambda: runs("quickbloom-edge"),
    "monitor": lambda: answers("http://127.0.0.1:6006"),
}

if __name__ == "__main__":
    sys.exit(0 if CHECKS[sys.argv[1]](*sys.argv[2:]) else 1)
