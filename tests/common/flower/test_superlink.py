"""The SuperLink that has less to do for every request."""

import sys
import time
import types
from functools import partial

import pytest
from flwr.supercore.corestate.sql_corestate import SqlCoreState
from flwr.superlink import cli

from quickbloom.common.flower import accepted, http, registry, superlink
from quickbloom.common.flower.states import absence, lost_messages, repeated_pushes


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every state that was looked through for lost tasks."""
    seen: list[object] = []
    monkeypatch.setattr(SqlCoreState, "_cleanup_expired_task_tokens", seen.append)
    monkeypatch.setattr(cli, "flower_superlink", lambda: None)
    for name in ("go_past", "look_up_at_once"):
        monkeypatch.setattr(http, name, partial(seen.append, name))
    monkeypatch.setattr(lost_messages, "answer_for_restarted_nodes", lambda: None)  # see test_lost_messages.py
    monkeypatch.setattr(repeated_pushes, "accept_repeated_pushes", lambda: None)  # see test_repeated_pushes.py
    monkeypatch.setattr(absence, "forgive_absence", lambda: None)  # see test_absence.py
    _, *words = superlink.command("--insecure")
    monkeypatch.setattr(sys, "argv", ["-c", *words[words.index("flower-superlink") :]])
    return seen


def look(state: object) -> None:
    SqlCoreState._cleanup_expired_task_tokens(state)  # type: ignore[arg-type]


def test_every_state_is_looked_through_at_once_and_then_once_a_second(
    looks: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = types.SimpleNamespace(), types.SimpleNamespace()
    superlink.main()
    clock = iter((0.0, 0.5, 0.99, 1.0, 1.5, 10.0, 10.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert sys.argv == ["flower-superlink", "--insecure"]
    for _ in range(6):
        look(one)
    look(other)
    assert looks == ["go_past", "look_up_at_once", one, one, one, other]


@pytest.mark.parametrize("why", ["turned off", "another release"])
def test_flowers_own_way_is_left_alone(why: str, looks: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "turned off":
        monkeypatch.setenv(registry.SWITCH, "0")
    else:
        monkeypatch.setattr(accepted, "ACCEPTED", {source: {} for source in accepted.ACCEPTED})
    superlink.main()
    for _ in range(3):
        look(None)
    assert len(looks) == 3
