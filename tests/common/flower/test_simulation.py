"""The loop that hands messages to simulated nodes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from quickbloom.common.flower import simulation
from quickbloom.common.flower.simulation import Loyal, add_messages_to_queue, addressees, pickling_once


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
    looked = threading.Event()

    def look(*arguments: Any) -> list[int]:
        looked.set()
        return addressees(*arguments)

    monkeypatch.setattr(simulation, "addressees", look)
    loop = threading.Thread(target=add_messages_to_queue, args=(state, queue, {10: 0}, over))
    loop.start()
    try:
        assert looked.wait(20)
        time.sleep(0.2)  # it has found nothing, and waits
        started = time.monotonic()
        assert state.store_message_ins(("a", 10)) == "a"
        assert queue.get(timeout=50).name == "a"
        assert time.monotonic() - started < 30
    finally:
        over.set()
        state.store_message_ins(("b", 20))
        loop.join(timeout=20)
    assert not loop.is_alive()


class Pool:
    """What is used of Flower's pool: the idle actors, and which of them is at what."""

    def __init__(self, *actors: str) -> None:
        self.pool = list(actors)
        self._future_to_actor: dict[Any, str] = {}

    def back(self, future: Any) -> str:
        """As Flower's own method: the result, here the name of the actor, which is idle again."""
        if self._future_to_actor[future] == "broken":
            raise RuntimeError("it has died")
        self.pool.append(self._future_to_actor.pop(future))
        return self.pool[-1]


def serve(loyal: Loyal, pool: Pool, *nodes: str) -> list[str]:
    """Which actor serves each of the nodes, of which all are asked before the first has answered."""
    futures = [loyal.submit(pool, lambda actor, *job: (actor, job[2]), (None, None, node, None)) for node in nodes]
    return [loyal.fetch(pool, future) for future in futures]


def test_a_node_stays_with_its_actor_while_that_is_idle() -> None:
    pool, loyal = Pool("a", "b"), Loyal(Pool.back)
    assert serve(loyal, pool, "0", "1") == ["b", "a"]
    assert serve(loyal, pool, "1", "0") == ["a", "b"]  # else it would be the other way round
    assert serve(loyal, pool, "0", "1") == ["b", "a"]
    pool.pool.remove("b")
    assert serve(loyal, pool, "0") == ["a"]  # its own is at work
    pool.pool.append("b")
    assert serve(loyal, pool, "0", "1") == ["a", "b"]
    assert not loyal._jobs
    assert not pool._future_to_actor


def test_a_node_does_not_stay_with_an_actor_that_failed_it() -> None:
    pool, loyal = Pool("a", "broken"), Loyal(Pool.back)
    with pytest.raises(RuntimeError, match="died"):
        serve(loyal, pool, "0")
    pool.pool.insert(0, "broken")  # Flower takes it for idle
    assert serve(loyal, pool, "0") == ["a"]
    assert serve(loyal, pool, "0") == ["a"]


def test_no_actor_gets_two_jobs_at_once() -> None:
    pool, loyal, at_work = Pool(*"abcd"), Loyal(Pool.back), set[str]()

    def begin(actor: str, *job: Any) -> Any:
        assert actor not in at_work
        at_work.add(actor)
        time.sleep(0.001)
        return actor, job

    def go_on(node: str) -> None:
        for turn in range(50):
            future = loyal.submit(pool, begin, (None, turn, node, None))
            at_work.remove(future[0])
            loyal.fetch(pool, future)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(go_on, "0123")) == [None] * 4
    assert sorted(pool.pool) == list("abcd")


def test_the_app_is_pickled_once() -> None:
    built = []
    backend = SimpleNamespace(app_fn=None)
    pickling_once(lambda it, app_fn: built.append((it, app_fn)), lambda app_fn: f"where {app_fn} is")(backend, "app")
    assert built == [(backend, "app")]
    assert backend.app_fn == "where app is"
