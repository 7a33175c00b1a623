"""The HTTP server of `quickbloom metrics`: /metrics for Prometheus, /healthz and /readyz for whoever restarts containers."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from quickbloom.common.errors import ConfigError
from quickbloom.server_app.deployment.certificate_metrics import CertificateMetrics
from quickbloom.server_app.deployment.run_metrics import RunMetrics

Start = Callable[[str, list[tuple[str, str]]], Any]


class _Quiet(WSGIRequestHandler):
    """Does not log requests: Prometheus asks every few seconds."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def serving(runs: Path, host: str, port: int, newest: int, server: str = "") -> ThreadingWSGIServer:
    """Return a server that is bound to its address and answers once it is asked to (`serve_forever`). `port`: 0: any.

    `server`: HOST:PORT of a SuperLink whose certificate is shown as well.

    Raises ConfigError if `runs` is no directory, or the address cannot be had.
    """
    if not runs.is_dir():
        raise ConfigError(f"RUNS must be a directory with runs in it, got '{runs}': it is `./runs` where runs were started")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunMetrics(runs, newest))
    if server:
        registry.register(CertificateMetrics(server))
    metrics = make_wsgi_app(registry)

    def answer(asked: dict[str, Any], start: Start) -> Iterable[bytes]:
        path = asked.get("PATH_INFO", "")
        if path == "/metrics":
            found: Iterable[bytes] = metrics(asked, start)
            return found
        if path == "/healthz":
            return _said(start, "200 OK", "ok")
        if path == "/readyz":
            there = runs.is_dir()
            return (
                _said(start, "200 OK", "ok")
                if there
                else _said(start, "503 Service Unavailable", "the directory of runs is gone")
            )
        return _said(start, "404 Not Found", "look at /metrics, /healthz or /readyz")

    try:
        return make_server(host, port, answer, ThreadingWSGIServer, handler_class=_Quiet)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"`--host` and `--port` must be a free address of this machine, got {host}:{port} ({reason})"
        ) from None


def _said(start: Start, status: str, words: str) -> list[bytes]:
    start(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{words}\n".encode()]
