"""How nodes and a SuperLink talk: gRPC on a port of its own up to Flower 1.39, HTTP on the SuperLink's one port from 1.40 on.

The installed Flower's files tell its transport. A server's transport is known from the server: only
gRPC agrees on HTTP/2 when TLS begins.
"""

import ssl
import urllib.error
import urllib.request
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from quickbloom.common.flower import registry
from quickbloom.common.system.loopback import is_loopback

GRPC, HTTP = "gRPC", "HTTP"
PROTOCOLS = ["h2", "http/1.1"]
"""Protocols that a node offers when TLS begins."""
_RELEASES = {GRPC: "1.39", HTTP: "1.40 to 1.42"}
_REQUIREMENTS = {GRPC: "flwr>=1.39,<1.40", HTTP: "flwr>=1.40,<1.43"}
_FLEET = "/v1/fleet/register-node"
"""A path that exists on the HTTP port of a SuperLink if nodes connect there."""


def spoken() -> str:
    """Return the transport of the installed Flower's nodes and SuperLink: GRPC or HTTP."""
    return HTTP if registry.exists("flwr.supernode.fleet_http_connection") else GRPC


def of_server(connection: ssl.SSLSocket) -> str:
    """Return the transport of the server at the other end of a connection that offered PROTOCOLS."""
    return GRPC if connection.selected_alpn_protocol() == "h2" else HTTP


def trouble(server: str, theirs: str, ca: Path) -> str:
    """Return why a node of the installed Flower cannot talk to `server` (HOST:PORT) with transport `theirs`; "" if it can."""
    if theirs == HTTP and _answer(server, _FLEET, ca)[0] == 404:
        return (
            f"{server} is where runs are started, and nodes of this federation connect to another port of its SuperLink: ask "
            "whoever runs it (9092 by default)"
        )
    if theirs == spoken():
        return ""
    return (
        f"{server} is a SuperLink whose nodes speak {theirs} (Flower {_RELEASES[theirs]}), and Flower {registry.version()} "
        f"here speaks {spoken()}: run pip install '{_REQUIREMENTS[theirs]}' on this device"
    )


def clock_of(server: str, ca: Path) -> datetime | None:
    """Return the time of `server` (HOST:PORT), which speaks HTTP, to the second; None if it does not tell."""
    date = _answer(server, "/health", ca)[1]
    try:
        return parsedate_to_datetime(date).astimezone(UTC)
    except ValueError:
        return None


def _answer(server: str, path: str, ca: Path) -> tuple[int, str]:
    """Return (status, date) of a server's answer; (0, "") if there is none."""
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=str(ca)))
    ]
    if is_loopback(server):
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        with urllib.request.build_opener(*handlers).open(f"https://{server}{path}", timeout=10) as answer:
            return answer.status, answer.headers.get("date", "")
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("date", "")
    except OSError:
        return 0, ""
