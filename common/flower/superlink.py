"""Flower's SuperLink with less work per request; all other code is Flower's own, called as its command calls it.

- For every piece of every message Flower searches its database for lost tasks and writes twice,
  although tasks have half a minute. The requests of a round wait for each other's writes. Here the
  search is once a second.
- A node that was killed at work and is soon online again is answered for (`common.flower.states.lost_messages`).
- A part of a message that is uploaded twice is stored (`common.flower.states.repeated_pushes`).
- A node's look that can find nothing costs no search, nor does a known key (`common.flower.states.empty_looks`).
- Writers wait in line (`common.flower.states.one_writer`).
- Runs and nodes outlive its own absence (`common.flower.states.absence`).
- The requests of a run's server bypass layers that are not for them (`common.flower.http`).
- A new certificate is shown without a restart (`common.flower.states.new_certificate`). One that ends soon is told of daily.

All but the last are patches of `common.flower.registry`, each with its own guard. A port that does not open ends the process:
Flower itself would go on without it.
"""

import argparse
import importlib
import importlib.metadata
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any

from quickbloom.common.flower import registry
from quickbloom.common.flower.states import new_certificate
from quickbloom.common.system import logs, loopback, tls
from quickbloom.common.system.terminal import FAILED, say_error

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

PAUSE = 1.0
"""Seconds between two searches for lost tasks."""
PATIENCE = 120.0
"""Seconds that Flower has to open its ports; it takes one or two on a machine that is not busy."""


def command(*arguments: str) -> list[str]:
    """Return the command line that starts Flower's SuperLink with these patches."""
    # -P: nothing is imported from the working directory.
    return [
        sys.executable,
        "-P",
        "-c",
        "from quickbloom.common.flower.superlink import main; main()",
        "flower-superlink",
        *arguments,
    ]


def main() -> None:
    """Run `flower-superlink`, which is the first argument, with the arguments after it."""
    sys.argv = sys.argv[1:]
    log_as_asked()
    allow_connections()
    # What is skipped must be heard all the same: `forgiven-absence` comes last.
    registry.apply("lost-tasks", "past-layers", "look-ups", "restarted-nodes", "repeated-pushes", "empty-looks", "known-keys")
    registry.apply("one-writer", "forgiven-absence")
    follow_certificate(sys.argv[1:])
    threading.Thread(target=end_unless_open, args=(addresses(sys.argv[1:]),), daemon=True).start()
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="flower-superlink")
    entry.load()()


def log_as_asked() -> None:
    """Write the log of this process as `common.system.logs` has it in the environment: Flower's, uvicorn's, and others'."""
    settings = logs.from_environment()
    if not settings:
        return
    logs.begin(settings)
    importlib.import_module("flwr.supercore.logger")  # brings a handler
    logs.forward([getLogger("flwr"), getLogger()])
    server: Any = importlib.import_module("uvicorn").Config
    configure = server.configure_logging

    def configure_and_forward(self: Any) -> None:
        """As uvicorn's, which brings handlers of its own."""
        configure(self)
        logs.forward([getLogger(name) for name in ("uvicorn", "uvicorn.error", "uvicorn.access")])

    server.configure_logging = configure_and_forward


def follow_certificate(arguments: Sequence[str]) -> None:
    """Show new certificates of the files in the arguments of `flower-superlink`, and log once a day if one ends soon."""
    known = _known(arguments, "--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile")
    if not (known.ssl_certfile and known.ssl_keyfile):
        return
    certificate = Path(known.ssl_certfile).expanduser()
    if new_certificate.take_up(certificate, Path(known.ssl_keyfile).expanduser()) is None:
        return

    def ending() -> str:
        mend = "renew it with `quickbloom deploy renew`, or `quickbloom secrets --renew-server`; no run stops"
        found = tls.soon("the SuperLink's certificate", tls.end_of(certificate.read_bytes()), mend)
        if not found and known.ssl_ca_certfile:
            authority = Path(known.ssl_ca_certfile).expanduser()
            mend = "make new secrets for the whole federation before"
            found = tls.soon(f"the CA's certificate '{authority}'", tls.end_of(authority.read_bytes()), mend)
        return found

    tls.remind(ending, lambda sentence: getLogger("flwr").log(WARNING, "%s", sentence))


def allow_connections() -> None:
    """Let this process hold as many files open as it may: each node is a connection, and the default is often 1,024."""
    if resource is not None:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with suppress(OSError, ValueError):  # macOS refuses what it calls unlimited
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def addresses(arguments: Sequence[str]) -> list[str]:
    """The addresses HOST:PORT that `flower-superlink` listens on by these arguments, as far as they say so."""
    known = _known(arguments, "--host", "--port", "--fleet-api-address")
    control = [loopback.joined(known.host, int(known.port))] if known.host and known.port else []
    return control + ([known.fleet_api_address] if known.fleet_api_address else [])


def _known(arguments: Sequence[str], *names: str) -> argparse.Namespace:
    """Return the values of some options; None for those that are not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(name)
    return parser.parse_known_args(arguments)[0]


def end_unless_open(listening: Sequence[str], patience: float = PATIENCE) -> None:
    """Wait until somebody listens at all of these addresses; after `patience` seconds end this process with one sentence."""
    deadline = time.monotonic() + patience
    for address in listening:
        while not is_open(address):
            if time.monotonic() > deadline:
                say_error(
                    f"Flower's SuperLink did not open {address} within {patience:g} s, so nobody can connect there: read its "
                    "log above, or choose another host or port"
                )
                os._exit(FAILED)  # threads of Flower's may never end
            time.sleep(0.5)


def is_open(address: str) -> bool:
    """Whether somebody listens at HOST:PORT of this machine."""
    host, port = loopback.split_address("address", address, "0.0.0.0:9092")
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with socket.create_connection((here, port), timeout=5):
            return True
    except OSError:
        return False


def look_seldom() -> None:
    """Let every state of this process search for lost tasks after PAUSE at the earliest."""
    state: Any = importlib.import_module("flwr.supercore.corestate.sql_corestate").SqlCoreState
    look = state._cleanup_expired_task_tokens

    def seldom(self: Any) -> None:
        now = time.monotonic()
        if now - getattr(self, "_looked", -PAUSE) >= PAUSE:
            self._looked = now
            look(self)

    state._cleanup_expired_task_tokens = seldom
