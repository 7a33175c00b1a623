"""Less overhead for Flower's HTTP requests, from a run's server to its SuperLink and from a worker to its SuperNode.

A round of three nodes takes more than thirty requests to the SuperLink. Each spends most of its
time before it reaches the function that answers it. The patches `past-layers` and `look-ups` of
`common.flower.registry` shorten this.
"""

import importlib
from collections.abc import Awaitable, Callable
from typing import Any

from quickbloom.common.flower import names

CONTROL = "/v1/control/"
"""Prefixes of the paths of users' requests."""
LAYERS = (
    "ControlSensitiveResponseMiddleware",
    "ControlEventLogMiddleware",
    "ControlLicenseMiddleware",
    "ControlAuthenticationMiddleware",
)
"""Layers around every request, each with a task and two streams. Only the second does something for requests that are not
users', and only if an event log is set up."""
LOOK_UPS = (
    ("flwr.supercore.protobuf.translation", "get_protobuf_request"),
    ("flwr.supercore.dependencies.runtime", "get_runtime_state"),
    ("flwr.supercore.dependencies.runtime", "get_runtime_handlers"),
    ("flwr.superlink.dependencies.linkstate", "get_linkstate"),
)
"""Functions that only return stored values. FastAPI calls them in another thread, as all that are no coroutines."""

Through = Callable[..., Awaitable[None]]


def go_past() -> None:
    """Let requests that are not users' bypass LAYERS, in this process."""
    layers: Any = importlib.import_module("flwr.superlink.routers.control.middlewares")
    for layer in filter(None, (getattr(layers, name, None) for name in LAYERS)):
        layer.__call__ = past(layer.__call__)


def past(through: Through) -> Through:
    """Return a replacement for a layer's `__call__`: users' and logged requests take the layer, others go to the next one."""

    async def called(layer: Any, scope: Any, receive: Any, send: Any) -> None:
        of_users = scope["type"] != "http" or scope["path"].startswith(CONTROL)
        logged = "app" in scope and getattr(scope["app"].state, "control_event_log_plugin", None) is not None
        await (through(layer, scope, receive, send) if of_users or logged else layer.app(scope, receive, send))

    return called


def look_up_at_once() -> None:
    """Let FastAPI call LOOK_UPS and the comparison of versions directly, not in another thread, in this process."""
    solving: Any = importlib.import_module("fastapi.dependencies.utils")
    versions = names.get("VersionDependency")
    functions = {getattr(importlib.import_module(module), name, None) for module, name in LOOK_UPS} - {None}
    elsewhere = solving.run_in_threadpool

    async def call(function: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(function, versions) or function in functions:
            return function(*arguments, **named)
        return await elsewhere(function, *arguments, **named)

    solving.run_in_threadpool = call
