"""Certificates that end soon are told of, once a day, as a server shows them."""

import queue
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from quickbloom.common.system.tls import SOON, end_of, remind, served, soon
from quickbloom.server_app.deployment.secrets import create

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (timedelta(days=30, seconds=1), ""),
        (timedelta(days=30), "it ends at 2026-01-31 12:00 UTC, in 30 days: mend it"),
        (timedelta(days=1, hours=5), "it ends at 2026-01-02 17:00 UTC, in 29 hours: mend it"),
        (timedelta(0), "it has ended, at 2026-01-01 12:00 UTC: mend it"),
        (timedelta(days=-400), "it has ended, at 2024-11-27 12:00 UTC: mend it"),
    ],
)
def test_it_is_told_a_month_ahead_and_afterwards(left: timedelta, said: str) -> None:
    assert soon("it", NOW + left, "mend it", NOW) == said
    assert timedelta(days=30) == SOON


@contextmanager
def tls_server(secrets: Path) -> Iterator[int]:
    """A port of loopback that shakes hands with these secrets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(secrets / "superlink" / "server.crt", secrets / "superlink" / "server.key")

    def shake_hands() -> None:
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            context.wrap_socket(connection, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=shake_hands)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


def test_a_server_shows_its_certificate_to_whoever_asks(tmp_path: Path) -> None:
    create(tmp_path / "secrets", ["node-1"], [], days=7)
    with tls_server(tmp_path / "secrets") as port:
        shown = served("127.0.0.1", port)
    assert shown == (tmp_path / "secrets" / "superlink" / "server.crt").read_bytes()
    assert abs(end_of(shown) - datetime.now(UTC) - timedelta(days=7)) < timedelta(minutes=5)


def test_what_is_seen_is_said_each_time_and_trouble_is_not() -> None:
    found: Iterator[str | OSError] = iter(["", "first", OSError(), "second"])
    said: queue.Queue[str] = queue.Queue()

    def look() -> str:
        one = next(found, "last")
        if isinstance(one, OSError):
            raise one
        return one

    remind(look, said.put, pause=0.01)
    assert [said.get(timeout=10) for _ in range(3)] == ["first", "second", "last"]
