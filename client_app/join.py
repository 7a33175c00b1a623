"""Takes part in a federation as a device: checks what can be checked, then runs Flower's SuperNode until stopped.

The SuperNode finds its server again after a restart or a network loss. It cannot start while the
server refuses its key. This also happens for a minute after a device lost power, because the server
still counts it as online. A refused node therefore retries for a while.
"""

import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quickbloom.client_app.owner.diary import visiting
from quickbloom.client_app.quiet_hours import QuietHours, outside
from quickbloom.common.errors import JoinError as JoinError
from quickbloom.common.flower import lean as lean_node
from quickbloom.common.flower import transport, workers
from quickbloom.common.system import logs, loopback, memory, surroundings, tls, user_code
from quickbloom.common.system.apart import apart
from quickbloom.common.system.processes import ENDINGS, start
from quickbloom.common.system.temporary import make_writable
from quickbloom.common.system.tls import distrust

if TYPE_CHECKING:
    from quickbloom.common.config.run import NodeConfig

Say = Callable[[str], None]

PATIENCE = 150.0
"""Seconds for which a refused key is retried: two of the server's heartbeats and some more."""
_REFUSED = "code: 2004"
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
LITTLE = 2e9
"""Bytes of memory below which a node is lean unless it is told otherwise."""


def join(
    server: str,
    secrets: Path,
    settings: Mapping[str, str],
    port: int,
    say: Say,
    poll: float = workers.LONGEST,
    quiet: QuietHours | None = None,
    *,
    lean: bool | None = None,
) -> int:
    """Take part in the federation at `server` (HOST:PORT) until stopped, and return the exit code. Raises JoinError.

    `secrets`: a folder with ca.crt and node.key. `settings`: node settings by name. `port`: the
    SuperNode's port for its own computations, on loopback. `poll`: largest number of seconds
    between two looks for work. `lean`: whether to keep little in memory between two messages; None:
    if this machine has less than LITTLE. The settings, the user's own file, the secrets and the clock are
    checked before anything connects.
    """
    # SIGTERM and SIGHUP act like Ctrl-C, also while this waits.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:
            signal.signal(ending, signal.default_int_handler)
    loopback.split_address("--server", server, "fl.example.org:9092")
    with visiting(settings.get("state-dir", str(default_state(server))), server) as visit:
        command = apart(partial(_checked, server, secrets, settings, port, say))
        visit.connected()
        tls.remind(partial(_ending, server, secrets / "ca.crt"), say)
        environment = {**_QUIET, **workers.sparing(), workers.POLL: str(poll)}
        if memory.total() < LITTLE if lean is None else lean:
            say("lean: little stays in memory between two messages, and each takes some seconds more")
            environment[lean_node.LEAN] = "1"
        visit.code = outside(quiet or QuietHours(), lambda: _supervise(command, environment, server, say), say)
        return visit.code


def _checked(server: str, secrets: Path, settings: Mapping[str, str], port: int, say: Say) -> list[str]:
    """Return the command of a SuperNode for the arguments of `join`, once all that can be checked is right."""
    from quickbloom.client_app.clock_check import check_against_ca, check_against_server
    from quickbloom.common.config.run import parse_node_config
    from quickbloom.common.maths.kernels.compiler import remark as kernel_remark

    host, number = loopback.split_address("--server", server, "fl.example.org:9092")
    loopback.check_ipv4("a node")
    config = node_settings({"show-rounds": "true", "state-dir": str(default_state(server)), **settings})
    parsed = parse_node_config(config)
    check_state_dir(parsed.state_dir)
    _check_data(parsed, say)
    if lacking := kernel_remark():
        say(lacking)
    check_files(secrets)
    check_against_ca(secrets / "ca.crt", datetime.now(UTC))
    speaks = wait_for(host, number, secrets / "ca.crt", say)
    if reason := transport.trouble(server, speaks, secrets / "ca.crt"):
        raise JoinError(reason)
    check_against_server(server, secrets, speaks=speaks)
    command = workers.command("flower-supernode", "--superlink", server, "--port", str(port))
    command += ["--root-certificates", str(secrets / "ca.crt"), "--auth-supernode-private-key", str(secrets / "node.key")]
    if config:
        command += ["--node-config", " ".join(f"{key}={_toml(value)}" for key, value in config.items())]
    return command


def node_settings(settings: Mapping[str, str]) -> dict[str, bool | int | str]:
    """Return settings with whole numbers as numbers, as Flower's `--node-config` reads them: "1" becomes 1."""
    truths = {"true": True, "false": False}
    return {
        key: truths[value] if value in truths else int(value) if value.lstrip("-").isdigit() else value
        for key, value in settings.items()
    }


def default_state(server: str) -> Path:
    """Return the folder in which this user's device keeps the state of the federation at `server`, such as personal models."""
    return states() / re.sub(r"[^\w.-]", "_", server)


def states() -> Path:
    """Return the folder in which this user's device keeps the state of all federations."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "quickbloom"


def _check_data(config: "NodeConfig", say: Say) -> None:
    """Raise DataError if the user's own file, if there is one, has a mistake."""
    if config.data_path:
        from quickbloom.client_app.check_data import describe  # imports torch, which takes seconds
        from quickbloom.common.datasets.own import MixedColumnError

        named = (config.data_path, config.task_column, config.target_column, config.task_name)
        declared: list[str] = []
        while True:
            try:
                settings = {"own.categorical": ",".join(declared)}
                lines = list(describe(*named, settings=settings, time=config.time_column))
                break
            except MixedColumnError as error:
                if error.column in declared:
                    raise
                say(f"{error.found}: this device is refused unless the run has `own.categorical={error.column}`")
                declared.append(error.column)
        for line in lines:
            say(line)


def check_state_dir(setting: str) -> None:
    """Raise JoinError unless the node setting `state-dir` is "" or names a writable directory. Makes it if it is missing."""
    if not setting:
        return
    directory = Path(setting).expanduser()
    try:
        make_writable(directory)
    except OSError as error:
        raise JoinError(
            f"`state-dir` must be a directory that user {os.getuid()} can write, got '{directory}' ({error.strerror}): "
            "give it to that user, or mount it writable"
        ) from None


def check_files(secrets: Path) -> None:
    """Raise JoinError unless `secrets` holds a CA certificate and a readable private key of a node."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    for name in ("ca.crt", "node.key"):
        try:
            content = (secrets / name).read_bytes()
        except OSError as error:
            raise JoinError(
                f"the file '{secrets / name}' cannot be read ({error.strerror}): "
                "copy this node's folder of `quickbloom secrets` here"
            ) from None
    try:
        usable = isinstance(load_ssh_private_key(content, password=None), ec.EllipticCurvePrivateKey)
    except Exception:  # cryptography raises several types for damaged keys
        usable = False
    if not usable:
        raise JoinError(
            f"'{secrets / 'node.key'}' must be an elliptic-curve private key in OpenSSH's format without a passphrase: "
            "take the one that `quickbloom secrets` made"
        )
    try:
        ssl.create_default_context(cafile=str(secrets / "ca.crt"))
    except ssl.SSLError:
        raise JoinError(
            f"'{secrets / 'ca.crt'}' is no certificate (PEM): take the one that `quickbloom secrets` made"
        ) from None


def wait_for(host: str, port: int, ca: Path, say: Say, pause: float = 3.0) -> str:
    """Return the transport of `host` once it answers with a certificate signed by `ca`; JoinError for another certificate."""
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(transport.PROTOCOLS)
    told = False
    while True:
        try:
            with (
                socket.create_connection((host, port), timeout=10) as raw,
                context.wrap_socket(raw, server_hostname=host) as met,
            ):
                return transport.of_server(met)
        except ssl.SSLCertVerificationError as error:
            raise JoinError(distrust(loopback.joined(host, port), error, ca)) from None
        except OSError as error:
            # A silent server may be a proxy, such as Docker's, whose server has not started yet.
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                raise JoinError(
                    f"{loopback.joined(host, port)} does not speak TLS ({error.reason}): is this the port for nodes of a "
                    "SuperLink?"
                ) from None
            if not told:
                say(f"waiting for {loopback.joined(host, port)} ({error.strerror or error})")
                told = True
            time.sleep(pause)


def name_of(secrets: Path) -> str:
    """Return the name of the node that `secrets` is of: that in its public key, else that of the folder."""
    try:
        words = (secrets / "node.key.pub").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        words = []
    return words[2] if len(words) == 3 else secrets.absolute().name


def _ending(server: str, ca: Path) -> str:
    """Return a sentence if the certificate of the server, or that of its CA, ends soon. Raises OSError or ValueError."""
    if found := tls.soon(f"the certificate of the CA '{ca}'", tls.end_of(ca.read_bytes()), "this device needs a new one"):
        return found
    shown = tls.served(*loopback.split_address("--server", server, "fl.example.org:9092"))
    mend = "whoever runs it renews it with `quickbloom deploy renew`, or `quickbloom secrets --renew-server`"
    return tls.soon(f"the certificate of {server}", tls.end_of(shown), mend)


def _supervise(command: list[str], environment: Mapping[str, str], server: str, say: Say) -> int:
    """Run the SuperNode and show its log. Start it again while the server refuses its key, for PATIENCE seconds."""
    refused_since: float | None = None
    while True:
        started = time.monotonic()
        refused, code = _run(command, environment, say)
        if not refused:
            return code
        if refused_since is None or time.monotonic() - started > PATIENCE:
            refused_since = started
            say(
                f"{server} refuses this node's key: it is not registered (`quickbloom secrets --register`), or it is in use by "
                f"another node, or this one's last connection has not lapsed; trying again for {PATIENCE:.0f} s"
            )
        if time.monotonic() - refused_since > PATIENCE:
            raise JoinError(
                f"{server} refuses this node's key: register it with `quickbloom secrets --register`, "
                "or stop the node that uses it"
            )
        time.sleep(5)


def _run(command: list[str], environment: Mapping[str, str], say: Say) -> tuple[bool, int]:
    """Return (whether the server refused the key, exit code) of one SuperNode, which gets the signals that end this process."""
    env = {**os.environ, **surroundings.for_processes(), user_code.FOLDER: str(Path.cwd()), **environment}
    child: subprocess.Popen[str] | None = None
    stopped = refused = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        if child:
            child.send_signal(signal.SIGTERM)  # the SuperNode then signs off from its server

    # Before the child starts: in its own session it would outlive this process.
    before = {number: signal.signal(number, stop) for number in ENDINGS if signal.getsignal(number) != signal.SIG_IGN}
    child = start(command, env)
    threading.Thread(target=_end_what_it_started, args=(child,), daemon=True).start()
    assert child.stdout is not None
    try:
        if stopped:
            child.send_signal(signal.SIGTERM)
        for line in child.stdout:
            refused |= _REFUSED in line
            # Flower's own account of the refusal follows, which `say` gives in one sentence.
            if not refused and not logs.relay(line):
                print(line, end="", flush=True)
        code = child.wait()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        child.stdout.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return refused and not stopped, 0 if stopped else code


def _end_what_it_started(child: subprocess.Popen[str]) -> None:
    """End the SuperExec of a SuperNode that has ended: it may live on, and hold the pipe from which the log is read."""
    child.wait()
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _toml(value: bool | int | str) -> str:
    return str(value).lower() if isinstance(value, int) else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
