"""What nodes and servers speak, and what is said where they cannot meet."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from quickbloom.client_app.clock_check import ClockError, check_against_server
from quickbloom.common.flower import transport
from quickbloom.server_app.deployment import serve

CA = Path("ca.crt")


@pytest.mark.parametrize(
    ("here", "there", "release"), [("gRPC", "HTTP", "flwr>=1.40,<1.43"), ("HTTP", "gRPC", "flwr>=1.39,<1.40")]
)
def test_who_cannot_meet_is_told_which_flower_to_install(
    here: str, there: str, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "spoken", lambda: here)
    monkeypatch.setattr(transport, "_answer", lambda *_: (405, ""))
    sentence = transport.trouble("fl.example.org:8000", there, CA)
    assert f"speak {there}" in sentence
    assert f"pip install '{release}'" in sentence
    assert transport.trouble("fl.example.org:8000", here, CA) == ""


def test_the_port_for_runs_is_told_from_that_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_answer", lambda *_: (404, ""))
    assert "is where runs are started" in transport.trouble("fl.example.org:8000", transport.HTTP, CA)


def test_a_wrong_clock_is_found_by_the_time_of_an_http_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    monkeypatch.setattr(transport, "_answer", lambda *_: (200, "Thu, 01 Jan 2026 12:00:00 GMT"))
    for right in (timedelta(0), timedelta(seconds=5), timedelta(minutes=-4)):
        check_against_server("fl.example.org:8000", Path(), now + right, transport.HTTP)
    for wrong in (timedelta(seconds=30), timedelta(minutes=-6)):
        with pytest.raises(ClockError, match=r"this device's clock says .* set it"):
            check_against_server("fl.example.org:8000", Path(), now + wrong, transport.HTTP)
    monkeypatch.setattr(transport, "_answer", lambda *_: (0, ""))
    check_against_server("fl.example.org:8000", Path(), now, transport.HTTP)


def test_a_port_of_its_own_for_nodes_is_refused_where_flower_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "spoken", lambda: transport.GRPC)
    assert serve._fleet_address(None, None) == serve.FLEET
    assert serve._fleet_address("127.0.0.1", 1) == ("127.0.0.1", 1)
    monkeypatch.setattr(transport, "spoken", lambda: transport.HTTP)
    assert serve._fleet_address(None, None) is None
    with pytest.raises(serve.ServeError, match="leave `--fleet-host` and `--fleet-port` out"):
        serve._fleet_address(None, 9092)
