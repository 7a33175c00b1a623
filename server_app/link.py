"""Flower's SuperLink with less to do for every request; everything else is Flower's own code, called as its command calls it.

- For every piece of every message Flower looks in its database for tasks of which nothing was heard for too long, and writes
  twice in doing so, though they have half a minute. The requests of a round wait for each other's writes. Here it looks once a
  second.
- Every request of a run's server goes through six layers that each start a task and two streams. Four of them do nothing but
  for requests of users. Here the others go past these four.

This reaches into one release of Flower, as `common.warm` does: with another, or with QUICKBLOOM_WARM=0, nothing is changed.
"""

import importlib
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from common import warm

PAUSE = 1.0
"""Seconds between two looks for tasks of which nothing is heard."""
CONTROL = "/v1/control/"
"""What the paths of users' requests begin with."""


def command(*arguments: str) -> list[str]:
    """The command line that starts Flower's SuperLink so."""
    # -P: nothing is imported from the working directory.
    return [sys.executable, "-P", "-c", "from server_app.link import main; main()", "flower-superlink", *arguments]


def main() -> None:
    """Run `flower-superlink` with the arguments after the first one, which is that name."""
    sys.argv = sys.argv[1:]
    if warm.wanted() and not warm.reason_against():
        look_seldom()
        go_past()
    importlib.import_module("flwr.superlink.cli").flower_superlink()


def look_seldom() -> None:
    """Let every state of this process look for lost tasks after PAUSE at the earliest."""
    state: Any = importlib.import_module("flwr.supercore.corestate.sql_corestate").SqlCoreState
    look = state._cleanup_expired_task_tokens

    def seldom(self: Any) -> None:
        now = time.monotonic()
        if now - getattr(self, "_looked", -PAUSE) >= PAUSE:
            self._looked = now
            look(self)

    state._cleanup_expired_task_tokens = seldom


def go_past() -> None:
    """Let requests that are none of users go past the layers that are for these alone."""
    layers: Any = importlib.import_module("flwr.superlink.routers.control.middlewares")
    for layer in (
        layers.ControlSensitiveResponseMiddleware,
        layers.ControlEventLogMiddleware,
        layers.ControlLicenseMiddleware,
        layers.ControlAuthenticationMiddleware,
    ):
        layer.__call__ = past(layer.__call__)


def past(through: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """The method `__call__` of a layer, for requests of users and where what happens is logged; others go to what is behind."""

    async def called(layer: Any, scope: Any, receive: Any, send: Any) -> None:
        of_users = scope["type"] != "http" or scope["path"].startswith(CONTROL)
        logged = "app" in scope and getattr(scope["app"].state, "control_event_log_plugin", None) is not None
        await (through(layer, scope, receive, send) if of_users or logged else layer.app(scope, receive, send))

    return called
