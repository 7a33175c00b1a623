"""What Flower's HTTP requests go past, and what they do not."""

import asyncio
import threading
from typing import Annotated, Any

import fastapi.dependencies.utils as solving
import httpx
import pytest
from fastapi import Depends, FastAPI
from flwr.supercore.dependencies import runtime
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink.routers.control import middlewares
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from quickbloom.common.flower import http

LAYERS = tuple(getattr(middlewares, name) for name in http.LAYERS)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Starlette:
    """Flower's layers around an app that answers every path with it, once requests go past them."""
    for layer in LAYERS:
        monkeypatch.setattr(layer, "__call__", layer.__call__)
    http.go_past()
    return Starlette(
        routes=[Route("/{path:path}", lambda request: PlainTextResponse(request.url.path))],
        middleware=[Middleware(layer) for layer in LAYERS],
    )


def get(app: Starlette, path: str) -> str:
    async def text() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://superlink") as client:
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


def test_of_all_paths_of_flower_those_of_users_begin_so() -> None:
    paths = {path for _, path in PROTOBUF_REQUEST_TYPES}
    of_users = {path for path in paths if middlewares._is_control_path(path)}
    assert {path for path in paths if path.startswith(http.CONTROL)} == of_users
    assert {path for _, path in middlewares.CONTROL_SENSITIVE_ROUTE_KEYS} <= of_users
    assert of_users < paths


def test_what_is_there_already_is_looked_up_without_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solving, "run_in_threadpool", run_in_threadpool)
    http.look_up_at_once()
    threads: dict[str, int] = {}

    def other() -> str:
        threads["other"] = threading.get_ident()
        return "other"

    class State:
        @property
        def runtime_handlers(self) -> str:
            threads["look-up"] = threading.get_ident()
            return "handlers"

    app = FastAPI()
    app.state = State()  # type: ignore[assignment]

    @app.get("/")
    async def found(
        handlers: Annotated[Any, Depends(runtime.get_runtime_handlers)], value: Annotated[str, Depends(other)]
    ) -> list[str]:
        threads["loop"] = threading.get_ident()
        return [handlers, value]

    assert get(app, "/") == '["handlers","other"]'
    assert threads["look-up"] == threads["loop"]
    assert threads["other"] != threads["loop"]
