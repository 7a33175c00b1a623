"""Exit code 0 if this container does its work: healthcheck.py superlink | superexec | supernode | monitor.

Uses the standard library alone.
"""

import ssl
import sys
import urllib.request
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


CHECKS = {
    # The name is in the certificate, and resolves to the network on which this port is served.
    "superlink": lambda: answers("https://superlink-control:8000/health"),
    "superexec": lambda: runs("flower-superexec"),
    "supernode": lambda: answers("http://127.0.0.1:9094/health"),
    "monitor": lambda: answers("http://127.0.0.1:6006"),
}

if __name__ == "__main__":
    sys.exit(0 if CHECKS[sys.argv[1]]() else 1)
