"""Waiting for replies: no longer than needed, and no longer than allowed."""

import gc
import math
import threading
import time
import weakref
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.superlink.grid import HttpGrid
from flwr.superlink.grid import InMemoryGrid as FlowersInMemoryGrid
from loopback import LoopbackGrid

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.wire import packing
from quickbloom.common.wire.messages import TRAIN, TrainReply, TrainRequest
from quickbloom.common.wire.roll_call import ROLL_CALL
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.messaging import polling_grid
from quickbloom.server_app.messaging.polling_grid import PollingGrid


class SlowGrid(LoopbackGrid):
    """Node i answers after `delays[i]` seconds; None: it cannot be reached, so that its message gets no id."""

    def __init__(self, delays: list[float | None]) -> None:
        super().__init__(len(delays), parse_run_config({}).flat())
        self.delays = delays
        self.due: dict[str, float] = {}
        self.looks = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids: list[str] = []
        for message in messages:
            delay = self.delays[message.metadata.dst_node_id - 100]
            if delay is None:
                ids.append(None)  # type: ignore[arg-type]  # as Flower's grid does
                continue
            ids += super().push_messages([message])
            self.due[ids[-1]] = time.monotonic() + delay
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.looks += 1
        return super().pull_messages([i for i in message_ids if time.monotonic() >= self.due[i]])


def ask(grid: SlowGrid, timeout: float | None) -> tuple[list[int], float]:
    """(nodes that answered, seconds waited)."""
    messages = [Message(RecordDict({"request": ConfigRecord()}), node_id, ROLL_CALL) for node_id in grid.get_node_ids()]
    started = time.monotonic()
    replies = PollingGrid(grid).send_and_receive(messages, timeout=timeout)
    return sorted(reply.metadata.src_node_id for reply in replies), time.monotonic() - started


@pytest.fixture(autouse=True)
def nodes_are_built() -> None:
    SlowGrid([0.0] * 3).send_and_receive([])
    ask(SlowGrid([0.0] * 3), None)


def test_returns_as_soon_as_all_replies_are_there() -> None:
    nodes, seconds = ask(SlowGrid([0.0, 0.1, 0.05]), timeout=30)
    assert len(nodes) == 3
    assert 0.1 <= seconds < 1.0


def test_waits_without_limit_if_there_is_none() -> None:
    assert len(ask(SlowGrid([0.0, 0.3]), timeout=None)[0]) == 2


def test_time_in_which_the_superlink_is_away_is_not_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(SlowGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            if self.looks == 1:  # a look that Flower's client repeats until the SuperLink is back
                time.sleep(0.5)
                self.due = {message_id: time.monotonic() + 0.1 for message_id in self.due}
            return super().pull_messages(message_ids)

    monkeypatch.setattr(polling_grid, "GRACE", 0.05)
    assert len(ask(Away([0.05, 0.05]), timeout=0.3)[0]) == 2
    monkeypatch.setattr(polling_grid, "GRACE", 99.0)  # so that no look is too long
    assert len(ask(Away([0.05, 0.05]), timeout=0.3)[0]) == 0


def test_returns_what_came_when_the_time_is_up() -> None:
    nodes, seconds = ask(SlowGrid([0.0, 99.0, 0.0]), timeout=0.2)
    assert len(nodes) == 2
    assert 0.2 <= seconds < 1.0


def test_does_not_wait_for_a_message_that_could_not_be_delivered() -> None:
    nodes, seconds = ask(SlowGrid([0.0, None, 0.0]), timeout=30)
    assert len(nodes) == 2
    assert seconds < 1.0
    assert ask(SlowGrid([None, None]), timeout=30)[0] == []


def test_looks_become_rarer_as_time_passes() -> None:
    grid = SlowGrid([0.5])
    ask(grid, timeout=30)
    # Every 4 ms would be 125 looks; a tenth of the time passed makes it about 10 + 10 ln(0.5 / 0.04).
    assert 5 < grid.looks < 60


@pytest.mark.parametrize(
    ("passed", "due", "look", "expected"),
    [
        (0.1, math.inf, math.inf, 0.01),  # nothing is known: a tenth of what has passed
        (0.001, math.inf, 0.0001, 0.004),
        (60.0, math.inf, 0.01, 0.5),
        (0.01, 0.1, 0.0001, 0.075),  # not before replies may be there
        (0.01, 1.0, 0.001, 0.5),  # but now and then, for this one may be quicker
        (0.6, 1.0, 0.001, 0.25),
        (0.9, 1.0, 0.001, 0.02),
        (1.4, 1.0, 0.001, 0.02),  # a fiftieth of a round is the most that is lost
        (1.4, 1.0, 0.015, 0.06),  # unless looking is dear
        (1.6, 1.0, 0.001, 0.16),  # something has changed: as if nothing were known
        (0.1, 0.1, 0.0001, 0.004),
        (100.0, 110.0, 0.01, 0.5),
    ],
)
def test_looks_are_dense_when_replies_are_due(passed: float, due: float, look: float, expected: float) -> None:
    assert polling_grid.pause(passed, due, look) == pytest.approx(expected)


def test_a_look_that_takes_long_is_taken_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = SlowGrid([0.6])
    quick = grid.pull_messages

    def slow(ids: Iterable[str]) -> list[Message]:
        time.sleep(0.03)
        return quick(ids)

    monkeypatch.setattr(grid, "pull_messages", slow)
    assert ask(grid, timeout=30)[0] == [100]
    assert grid.looks <= 0.6 / (5 * 0.03) + 3


def test_what_the_last_replies_took_says_when_the_next_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[float] = []
    plain = polling_grid.pause

    def watching(passed: float, due: float, look: float) -> float:
        known.append(due)
        return plain(passed, due, look)

    monkeypatch.setattr(polling_grid, "pause", watching)
    grid = SlowGrid([0.0, 0.2])
    asking = PollingGrid(grid)
    for first in (True, False):
        known.clear()
        messages = [Message(RecordDict({"request": ConfigRecord()}), i, ROLL_CALL) for i in grid.get_node_ids()]
        assert len(list(asking.send_and_receive(messages))) == 2
        assert known
        assert all(due == math.inf if first else 0.2 <= due < 10 for due in known)


class InMemoryGrid(SlowGrid):  # by this name it is known
    """One that stores a reply when it is due, and has it from then on, as Flower's simulation does."""

    def __init__(self, delays: list[float | None]) -> None:
        super().__init__(delays)
        self.state = SimpleNamespace(store_message_res=lambda message_id: self.due.update({message_id: 0.0}))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        listed = list(messages)
        ids = super().push_messages(listed)
        for message, message_id in zip(listed, ids, strict=True):
            self.due[message_id] = math.inf
            delay = self.delays[message.metadata.dst_node_id - 100]
            threading.Timer(delay or 0.0, lambda reply: self.state.store_message_res(reply), [message_id]).start()
        return ids


def test_in_a_simulation_a_reply_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling_grid, "pause", lambda passed, due, look: 60.0)
    nodes, seconds = ask(InMemoryGrid([0.3, 0.5]), timeout=120)
    assert nodes == [100, 101]
    assert 0.5 <= seconds < 30


def test_who_is_told_often_still_looks_for_a_tenth_of_the_time_at_most() -> None:
    asking = PollingGrid(InMemoryGrid([0.0]))
    assert asking._stored is not None
    asking._stored.set()
    started = time.monotonic()
    asking._rest(30.0, 0.03)
    assert 0.27 <= time.monotonic() - started < 15
    assert not asking._stored.is_set()


def test_replies_that_are_quicker_than_the_last_ones_are_soon_expected_sooner() -> None:
    grid = SlowGrid([0.05])
    asking = PollingGrid(grid)
    expected = asking._took[ROLL_CALL] = 0.5
    for _ in range(2):
        list(asking.send_and_receive([Message(RecordDict({"request": ConfigRecord()}), 100, ROLL_CALL)]))
        # Looked at 0.85 of what was expected, and found.
        assert 0.55 * expected < asking._took[ROLL_CALL] < 0.9 * expected
        expected = asking._took[ROLL_CALL]


def test_how_long_it_took_until_enough_were_there_is_what_is_expected() -> None:
    grid = SlowGrid([0.1, 99.0])
    asking = PollingGrid(grid)
    messages = [Message(RecordDict({"request": ConfigRecord()}), i, ROLL_CALL) for i in grid.get_node_ids()]
    assert len(list(asking.replies(messages, 60, lambda reply: True))) == 1
    assert 0.1 <= asking._took[ROLL_CALL] < 30


def test_other_grids_tell_of_nothing() -> None:
    assert polling_grid.told_of_replies(SlowGrid([])) is None
    nameless = InMemoryGrid([])
    del nameless.state.store_message_res
    assert polling_grid.told_of_replies(nameless) is None


def test_no_messages_need_no_look() -> None:
    grid = SlowGrid([0.0])
    assert PollingGrid(grid).send_and_receive([], timeout=30) == []
    assert grid.looks == 0


def test_small_messages_travel_as_one_record_but_for_the_roll_call() -> None:
    config = parse_run_config({"min-nodes": 2}).resolved()
    grid = LoopbackGrid(2, config.flat())
    replies: list[RecordDict] = []
    handed_out = grid.pull_messages
    grid.pull_messages = lambda ids: [replies.append(one.content) or one for one in handed_out(ids)]  # type: ignore
    asking = PollingGrid(grid, {"rounds": 9}, packs=True)
    population = call_roll(asking, config)
    meta = build_algorithm(config, population.spec).init()
    request = TrainRequest(meta, 1, 0, [population.splits["train"][0]])
    node = population.homes[request.task_ids[0]]
    (reply,) = asking.send_and_receive([Message(request.to_records(), node, TRAIN)])
    assert TrainReply.from_records(reply.content, 1).weight == 1
    kinds = [(message.metadata.message_type, list(message.content)) for message in grid.requests]
    assert kinds == [(ROLL_CALL, ["request", "settings"])] * 2 + [(TRAIN, ["packed"])]
    assert [list(records) for records in replies] == [["roll-call"], ["roll-call"], ["packed"]]


def test_a_message_that_is_sent_again_is_as_it_was() -> None:
    grid = LoopbackGrid(1, parse_run_config({}).flat())
    asking = PollingGrid(grid, {"rounds": 9}, packs=True)
    message = Message(RecordDict({"request": ConfigRecord({"round": 1})}), 100, TRAIN)
    for _ in range(2):
        asking.push_messages([message])
    contents = [packing.unpack(sent.content) for sent in grid.requests]
    assert [dict(records) for records in contents] == [{"request": {"round": 1}, "settings": {"rounds": 9}}] * 2


def test_messages_are_packed_where_they_leave_the_machine() -> None:
    assert polling_grid.hands_over(FlowersInMemoryGrid.__new__(FlowersInMemoryGrid))
    assert not polling_grid.hands_over(HttpGrid.__new__(HttpGrid))


def test_everything_else_is_passed_on() -> None:
    grid = SlowGrid([0.0, 0.0])
    polling_grid = PollingGrid(grid)
    assert list(polling_grid.get_node_ids()) == [100, 101]
    message = polling_grid.create_message(RecordDict(), ROLL_CALL, 101, "7")
    assert (message.metadata.dst_node_id, message.metadata.group_id) == (101, "7")
    assert list(polling_grid.pull_messages(polling_grid.push_messages([]))) == []


def test_an_error_of_the_network_goes_through() -> None:
    class Broken(SlowGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        ask(Broken([0.0]), timeout=1)


def test_an_upload_that_is_refused_is_repeated_twice() -> None:
    class Refusing(SlowGrid):
        refusals = 2

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            if self.refusals:
                self.refusals -= 1
                raise ObjectPushError("part", 1, "session")
            return super().push_messages(messages)

    refusing = Refusing([0.0, 0.0])
    assert len(ask(refusing, timeout=30)[0]) == 2
    refusing.refusals = 3
    with pytest.raises(ObjectPushError):
        ask(refusing, timeout=30)


def test_messages_to_many_nodes_are_pushed_a_few_at_a_time_in_order() -> None:
    pushed: list[int] = []

    class Counting(SlowGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            listed = list(messages)
            pushed.append(len(listed))
            return super().push_messages(listed)

    grid = Counting([0.0] * 40)
    messages = [Message(RecordDict({"request": ConfigRecord()}), node_id, ROLL_CALL) for node_id in grid.get_node_ids()]
    ids = list(PollingGrid(grid).push_messages(messages))
    assert pushed == [16, 16, 8]
    assert ids == [message.metadata.message_id for message in messages]


def test_a_group_of_messages_that_is_refused_leaves_the_ids_of_the_others_where_they_are() -> None:
    class Refusing(SlowGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            listed = list(messages)
            return [] if listed[0].metadata.dst_node_id == 100 else super().push_messages(listed)

    grid = Refusing([0.0] * 20)
    messages = [Message(RecordDict({"request": ConfigRecord()}), node_id, ROLL_CALL) for node_id in grid.get_node_ids()]
    ids = list(PollingGrid(grid).push_messages(messages))
    assert ids[:16] == [""] * 16
    assert ids[16:] == [message.metadata.message_id for message in messages[16:]]


def test_large_replies_are_fetched_one_at_a_time_and_small_ones_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for large, looks in ((0, [1, 1, 1]), (10**9, [3])):
        monkeypatch.setattr(polling_grid, "LARGE", large)
        grid, asked = SlowGrid([0.0] * 3), list[int]()
        pull = grid.pull_messages

        def counted(message_ids: Iterable[str], pull: Any = pull, asked: list[int] = asked) -> Any:
            asked.append(len(list(message_ids)))
            return pull(message_ids)

        monkeypatch.setattr(grid, "pull_messages", counted)
        assert len(ask(grid, timeout=30)[0]) == 3
        assert asked == looks


def test_a_reply_is_handed_on_before_the_last_one_has_come() -> None:
    grid = SlowGrid([0.0, 99.0])
    messages = [Message(RecordDict({"request": ConfigRecord()}), node_id, ROLL_CALL) for node_id in grid.get_node_ids()]
    assert next(iter(PollingGrid(grid).replies(messages, 30))).metadata.src_node_id == 100


def order(delays: list[float | None], timeout: float | None, enough: Any = None) -> list[int]:
    """The nodes in the order in which their replies are handed on, with all replies taken to be large."""
    grid = SlowGrid(delays)
    messages = [Message(RecordDict({"request": ConfigRecord()}), node_id, ROLL_CALL) for node_id in grid.get_node_ids()]
    return [reply.metadata.src_node_id for reply in PollingGrid(grid).replies(messages, timeout, enough)]


def test_large_replies_come_in_the_order_of_their_requests_and_none_is_lost_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert order([0.3, 0.0, 0.1], None) == [101, 102, 100]
    monkeypatch.setattr(polling_grid, "LARGE", 0)
    assert order([0.3, 0.0, 0.1], None) == [100, 101, 102]
    assert order([0.0, 99.0, 0.0], 0.3) == [100, 102]


def test_where_not_all_are_waited_for_nobody_holds_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling_grid, "LARGE", 0)
    assert order([99.0, 0.0, 0.0], 30, lambda reply: reply.metadata.src_node_id == 102) == [101, 102]


def test_nothing_of_what_was_sent_is_kept_while_replies_are_waited_for() -> None:
    grid = SlowGrid([0.0])
    request = Message(RecordDict({"request": ConfigRecord()}), 100, ROLL_CALL)
    replies, content = PollingGrid(grid).replies([request], 30), weakref.ref(request.content)
    grid.requests.clear()
    del request
    gc.collect()
    assert content() is None
    assert len(list(replies)) == 1
