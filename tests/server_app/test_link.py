"""The SuperLink that has less to do for every request."""

import asyncio
import sys
import time
import types
from typing import Any

import httpx
import pytest
from flwr.supercore.corestate.sql_corestate import SqlCoreState
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.superlink import cli
from flwr.superlink.routers.control import middlewares
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from common import warm
from server_app import link


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every state that was looked through for lost tasks."""
    seen: list[object] = []
    monkeypatch.setattr(SqlCoreState, "_cleanup_expired_task_tokens", seen.append)
    monkeypatch.setattr(cli, "flower_superlink", lambda: None)
    monkeypatch.setattr(link, "go_past", lambda: seen.append("past"))
    _, *words = link.command("--insecure")
    monkeypatch.setattr(sys, "argv", ["-c", *words[words.index("flower-superlink") :]])
    return seen


def look(state: object) -> None:
    SqlCoreState._cleanup_expired_task_tokens(state)  # type: ignore[arg-type]


def test_every_state_is_looked_through_at_once_and_then_once_a_second(
    looks: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 0.5, 0.99, 1.0, 1.5, 10.0, 10.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    one, other = types.SimpleNamespace(), types.SimpleNamespace()
    link.main()
    assert sys.argv == ["flower-superlink", "--insecure"]
    for _ in range(6):
        look(one)
    look(other)
    assert looks == ["past", one, one, one, other]


@pytest.mark.parametrize("why", ["turned off", "another release"])
def test_flowers_own_way_is_left_alone(why: str, looks: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "turned off":
        monkeypatch.setenv("QUICKBLOOM_WARM", "0")
    else:
        monkeypatch.setattr(warm, "RELEASE", "1.38.")
    link.main()
    for _ in range(3):
        look(None)
    assert len(looks) == 3


LAYERS = (
    middlewares.ControlSensitiveResponseMiddleware,
    middlewares.ControlEventLogMiddleware,
    middlewares.ControlLicenseMiddleware,
    middlewares.ControlAuthenticationMiddleware,
)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Starlette:
    """Flower's layers around an app that answers every path with it, once requests go past them."""
    for layer in LAYERS:
        monkeypatch.setattr(layer, "__call__", layer.__call__)
    link.go_past()
    return Starlette(
        routes=[Route("/{path:path}", lambda request: PlainTextResponse(request.url.path))],
        middleware=[Middleware(layer) for layer in LAYERS],
    )


def get(app: Starlette, path: str) -> str:
    async def text() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://link") as client:
            return (await client.get(path)).text

    return asyncio.run(text())


def test_users_are_still_asked_who_they_are(app: Starlette) -> None:
    with pytest.raises(FlowerError) as refused:
        get(app, "/v1/control/list-runs")
    assert refused.value.code == ApiErrorCode.ACCOUNT_AUTHENTICATION_NOT_INITIALIZED


def test_requests_of_users_go_through_every_layer(app: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = through(monkeypatch)
    assert get(app, "/v1/control/list-runs") == "/v1/control/list-runs"
    assert passed == list(LAYERS)


def test_other_requests_go_past_them(app: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = through(monkeypatch)
    for path in ("/v1/runtime/pull-object", "/health", "/v1/controls"):
        assert get(app, path) == path
    assert passed == []


def test_where_what_happens_is_logged_nothing_goes_past(app: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    app.state.control_event_log_plugin = object()
    passed = through(monkeypatch)
    assert get(app, "/v1/runtime/pull-object") == "/v1/runtime/pull-object"
    assert passed == list(LAYERS)


def through(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The layers through which a request has gone, which do nothing else from now on."""
    passed: list[type] = []

    async def dispatch(self: Any, request: Any, call_next: Any) -> Any:
        passed.append(type(self))
        return await call_next(request)

    for layer in LAYERS:
        monkeypatch.setattr(layer, "dispatch", dispatch)
    return passed


def test_no_path_of_users_is_anywhere_else() -> None:
    sensitive = {path for _, path in middlewares.CONTROL_SENSITIVE_ROUTE_KEYS}
    assert sensitive
    assert all(path.startswith(link.CONTROL) for path in sensitive)
    assert middlewares._is_control_path(link.CONTROL)
