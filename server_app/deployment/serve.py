"""The server's two processes, Flower's SuperLink and SuperExec, with mistakes reported before they start.

Both become Flower's own program (exec), so that signals and the exit code are its own.
"""

import os
import socket
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from quickbloom.common.errors import QuickbloomError
from quickbloom.common.flower import registry, transport, workers
from quickbloom.common.flower import superlink as flower_superlink
from quickbloom.common.flower.states import later_release
from quickbloom.common.system import logs, loopback
from quickbloom.common.system.temporary import make_writable
from quickbloom.common.system.tls import distrust
from quickbloom.server_app.deployment.certificates import check_certificate, load_certificate
from quickbloom.server_app.launch.flower_run import environment


class ServeError(QuickbloomError):
    """The server cannot start as requested. The text says why."""


FLEET = ("0.0.0.0", 9092)
"""Default address for nodes, if they have a port of their own."""


def superlink(
    secrets: Path,
    state: Path,
    host: str,
    port: int,
    fleet_host: str | None = None,
    fleet_port: int | None = None,
    log: logs.Settings | None = None,
) -> NoReturn:
    """Become a SuperLink with TLS, authenticated nodes and its database in `state`; ServerApps run in a SuperExec elsewhere.

    `secrets`: the folder `superlink/` of `quickbloom secrets`. `host`, `port`: whoever reaches them
    can start runs. `fleet_host`, `fleet_port`: the address for nodes, by default FLEET; refused if
    Flower has one port for all. `log`: how it logs, by default as Flower does. Raises ServeError, ConfigError or DatabaseError
    with one sentence.
    """
    log = log or logs.Settings()
    fleet = _fleet_address(fleet_host, fleet_port)
    logs.check(log)
    files = {name: secrets / name for name in ("ca.crt", "server.crt", "server.key", "superexec.secret")}
    if reason := check_certificate(files["server.crt"], files["ca.crt"], files["server.key"]):
        raise ServeError(reason)
    _readable(files["superexec.secret"])
    _writable(state)
    later_release.check(state / "superlink.db")
    for address in filter(None, ((host, port), fleet)):
        _free(*address)
    arguments: list[str | Path] = [
        *("--host", host, "--port", str(port), *(("--fleet-api-address", loopback.joined(*fleet)) if fleet else ())),
        *("--ssl-ca-certfile", files["ca.crt"], "--ssl-certfile", files["server.crt"], "--ssl-keyfile", files["server.key"]),
        *("--enable-supernode-auth", "--database", state / "superlink.db", "--isolation", "process"),
        *("--superexec-auth-secret-file", files["superexec.secret"], "--disable-runtime-dependency-installation"),
    ]
    _become(flower_superlink.command(*map(str, arguments)), log.to_environment())


def _fleet_address(host: str | None, port: int | None) -> tuple[str, int] | None:
    """Return the address for nodes; None if it is the SuperLink's one port."""
    if transport.spoken() == transport.GRPC:
        return host or FLEET[0], port or FLEET[1]
    if host is not None or port is not None:
        raise ServeError(
            f"nodes of Flower {registry.version()} connect to `--host` and `--port`, as those who start runs do: leave "
            "`--fleet-host` and `--fleet-port` out, or run pip install 'flwr>=1.39,<1.40' for a port of their own"
        )
    return None


def superexec(secrets: Path, address: str, runs: Path) -> NoReturn:
    """Become a SuperExec, which runs the ServerApps of the SuperLink at `address` (HOST:PORT) in their own processes.

    `secrets`: the folder `superexec/` of `quickbloom secrets`. `runs`: parent of the run
    directories. Raises ServeError.
    """
    _readable(secrets / "ca.crt")
    load_certificate(secrets / "ca.crt")
    _readable(secrets / "superexec.secret")
    _writable(runs)
    host, port = loopback.split_address("--superlink", address, "superlink:8000")
    _trusted(host, port, secrets / "ca.crt")
    arguments = ["--runtime-api-address", address, "--root-certificates", str(secrets / "ca.crt")]
    arguments += ["--superexec-auth-secret-file", str(secrets / "superexec.secret")]
    _become(workers.command("flower-superexec", *arguments))


def _become(command: Sequence[str], more: Mapping[str, str] | None = None) -> NoReturn:
    # The memory settings of `environment` are for processes that compute.
    os.execve(command[0], list(command), {**environment(), **workers.sparing(), **(more or {})})


def _readable(path: Path) -> None:
    try:
        path.read_bytes()
    except FileNotFoundError:
        raise ServeError(f"the file '{path}' is missing: make it with `quickbloom secrets`, or copy it here") from None
    except OSError as error:
        raise ServeError(
            f"the file '{path}' cannot be read ({error.strerror}): it must be one that this user may read"
        ) from None


def _writable(directory: Path) -> None:
    try:
        make_writable(directory)
    except OSError as error:
        raise ServeError(
            f"the directory '{directory}' must be one that user {os.getuid()} can write ({error.strerror}): "
            "give it to that user, or mount it writable"
        ) from None


def _trusted(host: str, port: int, ca: Path) -> None:
    """Refuse a SuperLink whose certificate `ca` did not sign. Flower itself waits for one that does not answer yet."""
    context = ssl.create_default_context(cafile=str(ca))
    try:
        with socket.create_connection((host, port), timeout=10) as raw, context.wrap_socket(raw, server_hostname=host):
            pass
    except ssl.SSLCertVerificationError as error:
        raise ServeError(distrust(loopback.joined(host, port), error, ca)) from None
    except OSError:
        return


def _free(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {loopback.joined(host, port)} ({error.strerror}): choose another host or port, or free it"
        ) from None
