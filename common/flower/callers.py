"""Restricts the HTTP ports that Flower's processes open on loopback to the user who runs them.

Flower does not authenticate callers there, and whoever reaches such a port runs code as its user: a
SuperLink accepts runs, a SuperNode hands out messages and takes replies. On loopback the kernel
knows the owner of the other end of a connection. Every connection is therefore looked up once, when
it is made, in /proc/net/tcp and tcp6. A connection of another user, root included, is closed before
a byte of it is read. A port that was opened for other machines (`--host`) is not restricted.

`python -P callers.py PROGRAM ARGUMENTS` runs one of Flower's commands with this restriction. This
file must not import this package: a file beside a user's own model may have the same name.
"""

import importlib
import importlib.metadata
import ipaddress
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ESTABLISHED = "01"
"""In any other state the program may have closed its socket, which then counts as root's."""

Address = tuple[str, int]


def can_tell() -> bool:
    """Return whether this system tells who owns a connection. Linux does."""
    return TABLES[0].exists()


def owner_of(near: Address, far: Address) -> int | None:
    """Return the user id of the owner of the end `near` of a connection to `far` on this machine; None if there is none."""
    ports = tuple(f":{end[1]:04X}" for end in (near, far))  # a cheap check first, since most lines belong to other connections
    for table in TABLES:
        for local, remote, state, owner in _connections(table):
            if (local[-5:], remote[-5:], state) != (*ports, _ESTABLISHED):
                continue
            if (_address(local), _address(remote)) == (near, far):
                return owner
    return None


def may_talk(caller: Address, here: Address) -> bool:
    """Return whether the connection from `caller` to `here`, an address of this process, is allowed."""
    if not ipaddress.ip_address(here[0]).is_loopback or not can_tell():
        return True
    return owner_of(_plain(caller), _plain(here)) == os.geteuid()


def guard() -> None:
    """Make every HTTP server that this process starts from now on close connections that are not allowed."""
    config: Any = importlib.import_module("uvicorn").Config
    load = config.load

    def loaded(self: Any) -> None:
        load(self)
        self.http_protocol_class = guarded(self.http_protocol_class)

    config.load = loaded


def guarded(protocol: type[Any]) -> type[Any]:
    """Return the asyncio protocol class `protocol`, which then ignores connections that are not allowed."""

    class Guarded(protocol):  # type: ignore[misc]
        _refused = False

        def connection_made(self, transport: Any) -> None:
            caller, here = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
            if caller and here and may_talk(caller[:2], here[:2]):
                super().connection_made(transport)
            else:
                self._refused = True
                transport.abort()

        def data_received(self, data: bytes) -> None:
            if not self._refused:
                super().data_received(data)

        def eof_received(self) -> Any:
            return None if self._refused else super().eof_received()

        def connection_lost(self, error: Exception | None) -> None:
            if not self._refused:
                super().connection_lost(error)

    return Guarded


def _connections(table: Path) -> Iterator[tuple[str, str, str, int]]:
    """Yield (near end, far end, state, user id) of every line of one of TABLES."""
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:  # a kernel without IPv6
        return
    for line in lines:
        _, local, remote, state, _, _, _, owner, *_ = line.split()
        yield local, remote, state, int(owner)


def _address(text: str) -> Address:
    """Convert "0100007F:1F90" to ("127.0.0.1", 8080): each group of eight digits is a number in this machine's byte order."""
    digits, _, port = text.partition(":")
    groups = (int(digits[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(digits), 8))
    return _plain((str(ipaddress.ip_address(b"".join(groups))), int(port, 16)))


def _plain(address: Address) -> Address:
    """Return an IPv4 address that is written as IPv6 as IPv4."""
    found = ipaddress.ip_address(address[0].partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found), address[1]


def command(program: str, *arguments: str) -> list[str]:
    """Return the command line that starts Flower's command `program` with this restriction."""
    # -P: nothing is imported from where this file lies.
    return [sys.executable, "-P", str(Path(__file__).resolve()), program, *arguments]


def main() -> None:
    """Become the program that the first argument names, with the arguments that follow."""
    sys.argv = sys.argv[1:]
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=sys.argv[0])
    guard()
    entry.load()()


if __name__ == "__main__":
    main()
