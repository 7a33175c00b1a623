"""The loop that hands messages to simulated nodes."""

import threading
from dataclasses import dataclass, field
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from server_app.simulation import add_messages_to_queue, addressees


@dataclass
class State:
    """What the loop uses of Flower's state in memory. `looks`: which nodes were looked at, in order."""

    message_ins_store: dict[str, Any] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)
    looks: list[int] = field(default_factory=list)

    def put(self, name: str, node_id: int) -> None:
        metadata = SimpleNamespace(dst_node_id=node_id, delivered_at="")
        self.message_ins_store[name] = SimpleNamespace(name=name, metadata=metadata)

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
