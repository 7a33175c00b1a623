"""Virtual time, by hand: who answers when, in which order, and what the server's waiting costs."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from loopback import LoopbackGrid

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.wire.messages import TRAIN
from quickbloom.common.wire.roll_call import ROLL_CALL
from quickbloom.server_app.messaging.devices import Device
from quickbloom.server_app.messaging.virtual_grid import VirtualGrid

HOUR = 3600.0


class EchoGrid(LoopbackGrid):
    """Every node answers every message at once, in the order of the messages."""

    def answer(self, message: Message) -> Message | None:
        return Message(RecordDict({}), reply_to=message)


def grid(*devices: Device, at: float = 0.0) -> VirtualGrid:
    made = VirtualGrid(EchoGrid(len(devices), parse_run_config({}).flat()))
    made.begin({100 + i: device for i, device in enumerate(devices)}, at)
    return made


def work(node_id: int, tasks: int = 1) -> Message:
    request = ConfigRecord({"task-ids": [f"t{i}" for i in range(tasks)]})
    return Message(RecordDict({"request": request}), node_id, TRAIN)


def nodes(replies: list[Message]) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


def test_replies_arrive_when_their_devices_are_done() -> None:
    slow = grid(Device(30), Device(10), Device(20))
    arrived = [(reply.metadata.src_node_id, slow.clock.now()) for reply in slow.replies([work(100), work(101, 4), work(102)])]
    assert arrived == [(102, 20.0), (100, 30.0), (101, 40.0)]


def test_what_comes_after_the_deadline_is_there_later() -> None:
    slow = grid(Device(30), Device(10))
    messages = [work(100), work(101)]
    assert nodes(slow.send_and_receive(messages, timeout=15.0)) == [101]
    assert slow.clock.now() == 15.0
    late = [messages[0].metadata.message_id]
    assert slow.pull_messages(late) == []
    slow.clock.sleep(14.9)
    assert slow.pull_messages(late) == []
    slow.clock.sleep(0.2)
    assert nodes(slow.pull_messages(late)) == [100]
    assert slow.pull_messages(late) == []  # once


def test_enough_ends_the_wait() -> None:
    slow = grid(Device(10), Device(20), Device(30))
    assert nodes(list(slow.replies([work(100), work(101), work(102)], 100.0, lambda m: m.metadata.src_node_id == 101))) == [
        100,
        101,
    ]
    assert slow.clock.now() == 20.0


def test_arrivals_are_those_of_the_next_instant_in_the_order_of_the_messages() -> None:
    slow = grid(Device(20), Device(10), Device(10))
    ids = slow.push_messages([work(100), work(102), work(101)])
    assert nodes(slow.arrivals(ids, 5.0)) == []
    assert slow.clock.now() == 5.0
    assert nodes(slow.arrivals(ids, 60.0)) == [102, 101]
    assert slow.clock.now() == 10.0


def test_a_device_does_one_thing_after_the_other() -> None:
    slow = grid(Device(10))
    ids = slow.push_messages([work(100), work(100)])
    assert (len(slow.arrivals(ids, 60.0)), slow.clock.now()) == (1, 10.0)
    assert (len(slow.arrivals(ids[1:], 60.0)), slow.clock.now()) == (1, 20.0)


def test_a_device_that_is_away_cannot_be_asked_and_goes_on_when_it_is_back() -> None:
    slow = grid(Device(2 * HOUR, 20, 22), Device(1.0), at=21 * HOUR)
    assert slow.get_node_ids() == [100, 101]
    ids = slow.push_messages([work(100)])
    slow.clock.sleep(1.5 * HOUR)
    assert slow.get_node_ids() == [101]
    assert nodes(slow.arrivals(ids, 24 * HOUR)) == [100]
    assert slow.clock.now() == pytest.approx(45 * HOUR)  # an hour on the evening before, an hour from 20 o'clock on


def test_a_fleet_that_is_away_at_midnight_begins_when_the_first_device_is_there() -> None:
    assert grid(Device(1.0, 8, 20), Device(1.0, 6, 9)).clock.now() == 6 * HOUR
    assert grid(Device(1.0, 8, 20), Device(1.0, 22, 3)).clock.now() == 0
    late = grid(Device(1.0, 8, 20), at=21 * HOUR)  # on the next morning
    assert late.clock.now() == 32 * HOUR
    assert late.get_node_ids() == [100]


def test_only_training_takes_time_and_only_between_begin_and_end() -> None:
    slow = VirtualGrid(EchoGrid(1, parse_run_config({}).flat()))
    assert nodes(slow.send_and_receive([work(100)])) == [100]
    slow.begin({100: Device(10)}, 0.0)
    call = Message(RecordDict({"request": ConfigRecord()}), 100, ROLL_CALL)
    assert nodes(slow.send_and_receive([call])) == [100]
    assert slow.clock.now() == 0.0
    (unfinished,) = slow.push_messages([work(100)])
    slow.end()
    assert nodes(slow.pull_messages([unfinished])) == [100]
    assert nodes(slow.send_and_receive([work(100)])) == [100]
    assert slow.clock.now() == 0.0


def call(node_id: int) -> Message:
    return Message(RecordDict({"request": ConfigRecord()}), node_id, ROLL_CALL)


def test_a_device_that_computes_does_not_answer_the_roll_call() -> None:
    """As a real one, which has one message at a time: else it counted as free, and its work piled up."""
    slow = grid(Device(100), Device(10))
    (unfinished,) = slow.push_messages([work(100)])
    assert [bool(one) for one in slow.push_messages([call(100), call(101)])] == [False, True]
    slow.clock.sleep(100.0)
    ids = slow.push_messages([call(100), call(101)])
    assert nodes(slow.pull_messages([*ids, unfinished])) == [100, 101, 100]


def test_what_nobody_has_fetched_is_dropped_when_its_device_gets_new_work() -> None:
    slow = grid(Device(10))
    for _ in range(20):
        slow.push_messages([work(100)])
        slow.clock.sleep(11.0)
    assert isinstance(slow.inner, LoopbackGrid)
    assert len(slow.inner._replies) == len(slow._due) == 1


class LaterGrid(EchoGrid):
    """As Flower's simulation: a reply is there some looks after its message."""

    looks = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.looks += 1
        return super().pull_messages(message_ids) if self.looks % 3 == 0 else []

    def replies(self, *arguments: Any) -> Iterator[Message]:
        raise AssertionError("virtual time waits by itself")

    def arrivals(self, message_ids: Sequence[str], timeout: float) -> list[Message]:
        return self.pull_messages(message_ids)


def test_what_is_due_is_there_however_long_it_takes_to_be_computed_here() -> None:
    slow = VirtualGrid(LaterGrid(1, parse_run_config({}).flat()))
    slow.begin({100: Device(10)})
    assert nodes(slow.pull_messages(slow.push_messages([call(100)]))) == [100]
