"""This machine's own address: never reached through a proxy, and IPv4, which Flower's processes use among themselves."""

import os
import socket
from collections.abc import Mapping
from importlib.util import find_spec

from quickbloom.common.errors import ConfigError

NAMES = ("127.0.0.1", "localhost", "::1")
_EXCEPTIONS = ("no_proxy", "NO_PROXY")
_GRPC = "no_grpc_proxy"
"""gRPC's own variable; where it is set, gRPC does not look at the others."""


def direct(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that except NAMES from every proxy of `environ`, besides what is excepted there already.

    Programs differ in which spelling they read, so both are there; one that is missing says what the other says.
    """
    environ = os.environ if environ is None else environ
    known = {name: environ[name] for name in (*_EXCEPTIONS, _GRPC) if name in environ}
    wanted = {name: known.get(name, known.get(name.swapcase(), "")) for name in _EXCEPTIONS}
    return {name: _with_loopback(value) for name, value in (known | wanted).items()}


def _with_loopback(exceptions: str) -> str:
    given = [part.strip() for part in exceptions.split(",") if part.strip()]
    # "*" excepts everything, and only if it stands alone.
    return "*" if "*" in given else ",".join([*given, *(name for name in NAMES if name not in given)])


def without_socks(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that turn SOCKS proxies of `environ` off where Flower's HTTP library would not start because of them."""
    return {} if find_spec("socksio") else dict.fromkeys(_socks(environ), "")


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is on this machine, by its name."""
    return address.rpartition(":")[0].strip("[]") in NAMES


def check_socks(address: str) -> None:
    """Raise ConfigError if Flower would have to reach `address` (HOST:PORT) through a SOCKS proxy, and cannot.

    For loopback such a proxy is turned off in this process.
    """
    unusable = without_socks(os.environ)
    if is_loopback(address):
        os.environ.update(unusable)
        return
    for name in unusable:
        raise ConfigError(
            f"the SOCKS proxy that `{name}` names needs socksio, which is not installed: run pip install 'httpx[socks]', or "
            f"unset `{name}`"
        )


def _socks(environ: Mapping[str, str]) -> list[str]:
    return [name for name, value in environ.items() if name.lower().endswith("_proxy") and value.lower().startswith("socks")]


def check_ipv4(what: str, instead: str = "") -> None:
    """Raise ConfigError where this machine has no 127.0.0.1. `what` needs it."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        raise ConfigError(
            f"{what} needs the address 127.0.0.1 (IPv4), which this machine does not have ({error.strerror}): add it, such as "
            f"with `ip address add 127.0.0.1/8 dev lo`{instead}"
        ) from None


def split_address(setting: str, address: str, example: str) -> tuple[str, int]:
    """(host, port) of "HOST:PORT" or "[::1]:PORT"; the host without brackets. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not (colon and bare and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"`{setting}` must be HOST:PORT, such as {example}, got '{address}'")
    if ":" in host and bare == host:
        raise ConfigError(f"`{setting}` must have an IPv6 address in brackets, such as [::1]:{port}, got '{address}'")
    return bare, int(port)


def joined(host: str, port: int) -> str:
    """ "HOST:PORT", with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
