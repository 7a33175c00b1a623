"""The loop that hands messages to simulated nodes."""

import threading
import time
from dataclasses import dataclass, field
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from server_app import simulation
from server_app.simulation import add_messages_to_queue, addressees, loyal, pickling_once


@dataclass
class State:
    """What the loop uses of Flower's state in memory. `looks`: which nodes were looked at, in order."""

    message_ins_store: dict[str, Any] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)
    looks: list[int] = field(default_factory=list)

    def put(self, name: str, node_id: int) -> None:
        metadata = SimpleNamespace(dst_node_id=node_id, delivered_at="")
        self.message_ins_store[name] = SimpleNamespace(name=name, metadata=metadata)

    def store_message_ins(self, message: tuple[str, int]) -> str:
        self.put(*message)
        return message[0]

    def get_message_ins(self, node_id: int, limit: int) -> list[Any]:
        self.looks.append(node_id)
        waiting = [
            m for m in self.message_ins_store.values() if m.metadata.dst_node_id == node_id and not m.metadata.delivered_at
        ]
        for message in waiting[:limit]:
            message.metadata.delivered_at = "now"
        return waiting[:limit]


@pytest.fixture
def state() -> State:
    result = State()
    for name, node_id in (("a", 30), ("b", 10), ("c", 30), ("d", 99)):
        result.put(name, node_id)
    return result


def test_only_nodes_that_have_mail_are_looked_at_in_the_order_of_the_nodes(state: State) -> None:
    nodes = {10: 0, 20: 1, 30: 2}
    assert addressees(state, nodes) == [10, 30]
    state.message_ins_store["b"].metadata.delivered_at = "now"
    assert addressees(state, nodes) == [30]
    assert addressees(State(), nodes) == []


def test_every_message_for_a_node_is_handed_on_once_until_the_end(state: State) -> None:
    queue: Queue[Any] = Queue()
    over = threading.Event()
    loop = threading.Thread(target=add_messages_to_queue, args=(state, queue, {10: 0, 20: 1, 30: 2}, over))
    loop.start()
    try:
        assert [queue.get(timeout=20).name for _ in range(3)] == ["b", "a", "c"]  # one for each node in a look
        state.put("e", 20)
        assert queue.get(timeout=20).name == "e"
    finally:
        over.set()
        loop.join(timeout=20)
    assert not loop.is_alive()
    assert queue.empty()
    assert state.looks == [10, 30, 30, 20]  # node 99 is none of the nodes here


def test_the_loop_is_told_of_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "LONGEST", 60.0)
    state, queue, over = State(), Queue[Any](), threading.Event()
    loop = threading.Thread(target=add_messages_to_queue, args=(state, queue, {10: 0}, over))
    loop.start()
    try:
        while not is_wrapped(state):
            time.sleep(0.01)
        time.sleep(0.2)  # it has looked, and waits
        assert state.store_message_ins(("a", 10)) == "a"
        assert queue.get(timeout=20).name == "a"
    finally:
        over.set()
        state.store_message_ins(("b", 20))
        loop.join(timeout=20)
    assert not loop.is_alive()


def is_wrapped(state: State) -> bool:
    return "store_message_ins" in vars(state)


class Pool:
    """What is used of Flower's pool: the idle actors, of which `submit` takes the last."""

    def __init__(self, *actors: str) -> None:
        self.pool = list(actors)

    def submit(self, actor_fn: Any, job: tuple[Any, Any, str, Any]) -> Any:
        return actor_fn(self.pool.pop(), job)


def test_a_node_stays_with_its_actor_while_that_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "submit", loyal(Pool.submit))
    pool = Pool("a", "b")

    def served(*nodes: str) -> list[str]:
        actors = [pool.submit(lambda actor, job: actor, (None, None, node, None)) for node in nodes]
        pool.pool += actors  # they come back in this order
        return actors

    assert served("0", "1") == ["b", "a"]
    assert served("1", "0") == ["a", "b"]  # else it would be the other way round
    assert served("0", "1") == ["b", "a"]
    pool.pool.remove("b")
    assert served("0") == ["a"]  # its own is at work
    pool.pool.append("b")
    assert served("0", "1") == ["a", "b"]


def test_the_app_is_pickled_once() -> None:
    built = []
    backend = SimpleNamespace(app_fn=None)
    pickling_once(lambda it, app_fn: built.append((it, app_fn)), lambda app_fn: f"where {app_fn} is")(backend, "app")
    assert built == [(backend, "app")]
    assert backend.app_fn == "where app is"
