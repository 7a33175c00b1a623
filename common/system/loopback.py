"""Loopback addresses, which must bypass proxies, and checks for IPv4, which Flower's processes use among themselves."""

import os
import socket
from collections.abc import Mapping
from importlib.util import find_spec

from quickbloom.common.errors import ConfigError

NAMES = ("127.0.0.1", "localhost", "::1")
_EXCEPTIONS = ("no_proxy", "NO_PROXY")
_GRPC = "no_grpc_proxy"
"""gRPC's own variable; if it is set, gRPC ignores the others."""


def direct(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return variables that exempt NAMES from every proxy of `environ`, in addition to existing exemptions.

    Programs differ in the spelling they read, so both are set; a missing one is copied from the
    other.
    """
    environ = os.environ if environ is None else environ
    known = {name: environ[name] for name in (*_EXCEPTIONS, _GRPC) if name in environ}
    wanted = {name: known.get(name, known.get(name.swapcase(), "")) for name in _EXCEPTIONS}
    return {name: _with_loopback(value) for name, value in (known | wanted).items()}


def _with_loopback(exceptions: str) -> str:
    given = [part.strip() for part in exceptions.split(",") if part.strip()]
    # "*" exempts everything, but only on its own.
    return "*" if "*" in given else ",".join([*given, *(name for name in NAMES if name not in given)])


def without_socks(environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables that turn off SOCKS proxies with which Flower's HTTP library would not start."""
    return {} if find_spec("socksio") else dict.fromkeys(_socks(environ), "")


def is_loopback(address: str) -> bool:
    """Return whether the host name of HOST:PORT means this machine."""
    return address.rpartition(":")[0].strip("[]") in NAMES


def check_socks(address: str) -> None:
    """Raise ConfigError if Flower would need a SOCKS proxy to reach `address` (HOST:PORT) and cannot use one.

    For a loopback address such a proxy is turned off in this process.
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
    """Raise ConfigError if this machine has no address 127.0.0.1. `what` names the part that needs it."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        raise ConfigError(
            f"{what} needs the address 127.0.0.1 (IPv4), which this machine does not have ({error.strerror}): add it, such as "
            f"with `ip address add 127.0.0.1/8 dev lo`{instead}"
        ) from None


def split_address(setting: str, address: str, example: str) -> tuple[str, int]:
    """Return (host, port) of "HOST:PORT" or "[::1]:PORT", the host without brackets. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not (colon and bare and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"`{setting}` must be HOST:PORT, such as {example}, got '{address}'")
    if ":" in host and bare == host:
        raise ConfigError(f"`{setting}` must have an IPv6 address in brackets, such as [::1]:{port}, got '{address}'")
    return bare, int(port)


def joined(host: str, port: int) -> str:
    """Return "HOST:PORT", with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
