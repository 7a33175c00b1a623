"""A reply that a node has announced and never delivers holds a round up until the deadline, not for Flower's three minutes.

Flower's own grid over HTTP, with a SuperLink in its place that has the reply's place and never its contents.
"""

import importlib
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.flower.upload_deadline import awaited_until, limit_uploads
from quickbloom.common.wire.messages import TRAIN
from quickbloom.common.wire.roll_call import ROLL_CALL
from quickbloom.server_app.messaging import polling_grid
from quickbloom.server_app.messaging.failures import UNFINISHED, failure
from quickbloom.server_app.messaging.node_status import Reachability
from quickbloom.server_app.messaging.polling_grid import PollingGrid
from quickbloom.server_app.messaging.population import Population

http_grid: Any = importlib.import_module("flwr.superlink.grid.http_grid")
SPEC = DataSpec("classification", (4,), 2)


class Announcing:
    """A SuperLink that says that the replies are there, and of their contents that they come later, for 20 s.

    Those of the messages in `complete` are there.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.complete: set[str] = set()
        self._stored: dict[str, bytes] = {}
        self._until = time.monotonic() + 20

    def replies(self, request: Any) -> PullAppMessagesResponse:
        answer = PullAppMessagesResponse()
        for message_id in request.message_ids:
            reply = Message(RecordDict({"reply": ConfigRecord({"to": message_id})}), 1, TRAIN)
            reply.metadata.__dict__["_reply_to_message_id"] = message_id
            answer.messages_list.append(message_to_proto(remove_content_from_message(reply)))
            answer.messages_list[-1].metadata.message_id = reply.object_id
            answer.message_object_trees.append(get_object_tree(reply))
            if message_id in self.complete:
                self._stored |= {key: part.deflate() for key, part in get_all_nested_objects(reply).items()}
        return answer

    def contents(self, request: Any) -> PullObjectResponse:
        self.asked += 1
        if part := self._stored.get(request.object_id):
            return PullObjectResponse(object_found=True, object_available=True, object_content=part)
        return PullObjectResponse(object_found=time.monotonic() < self._until, object_available=False)


@pytest.fixture
def superlink() -> Announcing:
    return Announcing()


@pytest.fixture
def grid(superlink: Announcing, monkeypatch: pytest.MonkeyPatch) -> HttpGrid:
    monkeypatch.setattr(http_grid, "pull_objects", http_grid.pull_objects)  # undone at the end, whatever is put there
    monkeypatch.setattr(polling_grid, "GRACE", 0.1)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # without which Flower builds no message
    grid: Any = HttpGrid(token="none")
    grid._client = SimpleNamespace(
        PullMessages=superlink.replies, PullObject=superlink.contents, ConfirmMessageReceived=lambda request: None
    )
    grid._run = SimpleNamespace(run_id=1)
    return cast(HttpGrid, grid)


def test_an_unfinished_upload_is_given_up_at_the_deadline(grid: HttpGrid, superlink: Announcing) -> None:
    limit_uploads(grid)
    started = time.monotonic()
    with awaited_until(started + 1.5):
        replies = list(grid.pull_messages(["a"]))
    assert [reply.metadata.reply_to_message_id for reply in replies] == ["a"]
    assert failure(replies[0]) == UNFINISHED
    # Asked after 0, 1 and 2 s, each up to a fifth sooner or later.
    assert 1.5 <= time.monotonic() - started < 10
    assert superlink.asked > 1


@pytest.mark.parametrize("large", [False, True])
def test_several_of_them_hold_nobody_up_who_has_uploaded_in_full(
    grid: HttpGrid, superlink: Announcing, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    names = [f"m{i}" for i in range(6)]
    monkeypatch.setattr(grid, "push_messages", lambda messages: names)
    monkeypatch.setattr(polling_grid, "LARGE", 0 if large else 10**9)
    superlink.complete = {"m1", "m5"}
    messages = [Message(RecordDict({"request": ConfigRecord()}), node, TRAIN) for node in range(1, 7)]
    started = time.monotonic()
    replies = PollingGrid(grid).send_and_receive(messages, timeout=0.5)
    assert time.monotonic() - started < 10
    said = {reply.metadata.reply_to_message_id: failure(reply) for reply in replies}
    assert said == {name: None if name in superlink.complete else UNFINISHED for name in names}


def test_once_enough_are_there_no_upload_is_waited_for(
    grid: HttpGrid, superlink: Announcing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "push_messages", lambda messages: ["m0", "m1"])
    monkeypatch.setattr(polling_grid, "LARGE", 0)
    superlink.complete = {"m0"}
    messages = [Message(RecordDict({"request": ConfigRecord()}), node, TRAIN) for node in (1, 2)]
    started = time.monotonic()
    replies = list(PollingGrid(grid).replies(messages, 30, lambda reply: not reply.has_error()))
    assert [failure(reply) for reply in replies] == [None, UNFINISHED]
    assert time.monotonic() - started < 10


def test_between_rounds_nothing_is_waited_for_and_the_node_is_called_again(grid: HttpGrid) -> None:
    limit_uploads(grid)
    nodes = Reachability(Population(SPEC, {"a": 1}, {}, {}, nodes={1}), patience=60)
    nodes.owes(Message(RecordDict(), 1, TRAIN).metadata)
    called: list[Message] = []
    grid.get_node_ids = lambda: [1]  # type: ignore[method-assign]
    grid.push_messages = lambda messages: called.extend(messages) or ["call"]  # type: ignore[method-assign, func-returns-value]
    started = time.monotonic()
    nodes.refresh(grid)  # gives the reply up that is owed, and calls
    nodes.refresh(grid)  # gives up the answer to the call, and calls again
    assert time.monotonic() - started < 10
    assert [(message.metadata.message_type, message.metadata.dst_node_id) for message in called] == [(ROLL_CALL, 1)] * 2
    assert nodes.away == [1]
    assert not nodes.late


def test_without_a_deadline_flower_s_own_limit_holds(grid: HttpGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def fetch(*, object_ids: Any, pull_object_fn: Any, max_time: float = 7200, backoff_cap: float = 10) -> dict[str, bytes]:
        given.append(max_time)
        raise ObjectPullError(object_ids[0], "no")

    monkeypatch.setattr(http_grid, "pull_objects", fetch)
    limit_uploads(grid)
    limit_uploads(grid)  # a second run in one process
    list(grid.pull_messages(["a"]))
    with awaited_until(time.monotonic() + 50):
        list(grid.pull_messages(["a"]))
    with awaited_until(time.monotonic() - 50):
        list(grid.pull_messages(["a"]))
    assert given == [7200, pytest.approx(50, abs=5), 0]


def test_a_grid_that_fetches_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[Any] = [lambda ids: {}, None]
    for other in others:  # a release without the limit, or without the function
        monkeypatch.setattr(http_grid, "pull_objects", other)
        limit_uploads(HttpGrid(token="none"))
        assert http_grid.pull_objects is other
