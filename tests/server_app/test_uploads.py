"""A reply that a node has announced and never delivers holds a round up until the deadline, not for Flower's three minutes.

Flower's own grid over HTTP, with a SuperLink in its place that has the reply's place and never its contents.
"""

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid, http_grid

from common.wire import TRAIN
from server_app import uploads
from server_app.polling import PollingGrid
from server_app.uploads import awaited_until, bound


class Announcing:
    """A SuperLink that says that the replies are there, and of their contents that they come later."""

    def __init__(self) -> None:
        self.asked = 0

    def replies(self, request: Any) -> PullAppMessagesResponse:
        answer = PullAppMessagesResponse()
        for message_id in request.message_ids:
            reply = Message(RecordDict({"reply": ConfigRecord({"to": message_id})}), 1, TRAIN)
            answer.messages_list.append(message_to_proto(remove_content_from_message(reply)))
            answer.messages_list[-1].metadata.reply_to_message_id = message_id
            answer.message_object_trees.append(get_object_tree(reply))
        return answer

    def contents(self, _: Any) -> PullObjectResponse:
        self.asked += 1
        return PullObjectResponse(object_found=True, object_available=False)


@pytest.fixture
def superlink() -> Announcing:
    return Announcing()


@pytest.fixture
def grid(superlink: Announcing, monkeypatch: pytest.MonkeyPatch) -> HttpGrid:
    monkeypatch.setattr(http_grid, "pull_objects", http_grid.pull_objects)  # undone at the end, whatever is put there
    monkeypatch.setattr(uploads, "LEAST", 0.1)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # without which Flower builds no message
    grid: Any = HttpGrid(token="none")
    grid._client = SimpleNamespace(PullMessages=superlink.replies, PullObject=superlink.contents)
    grid._run = SimpleNamespace(run_id=1)
    return cast(HttpGrid, grid)


def test_an_unfinished_upload_is_given_up_at_the_deadline(grid: HttpGrid, superlink: Announcing) -> None:
    bound(grid)
    started = time.monotonic()
    with awaited_until(started + 1.5):
        replies = list(grid.pull_messages(["a"]))
    assert [reply.metadata.reply_to_message_id for reply in replies] == ["a"]
    assert replies[0].has_error()
    # Flower asks after 0, 1 and 3 s, each up to a fifth sooner or later.
    assert 1.5 <= time.monotonic() - started < 10
    assert superlink.asked > 1


def test_a_round_with_several_of_them_ends_soon_after_its_deadline(grid: HttpGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    polling = PollingGrid(grid)
    monkeypatch.setattr(grid, "push_messages", lambda messages: [f"m{i}" for i, _ in enumerate(messages)])
    messages = [Message(RecordDict({"request": ConfigRecord()}), node, TRAIN) for node in (1, 2, 3)]
    started = time.monotonic()
    replies = polling.send_and_receive(messages, timeout=0.5)
    assert len(replies) == 3
    assert all(reply.has_error() for reply in replies)
    assert time.monotonic() - started < 15


def test_without_a_deadline_flower_s_own_limit_holds(grid: HttpGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def fetch(*, object_ids: Any, pull_object_fn: Any, max_time: float | None = 7200) -> dict[str, bytes]:
        given.append(max_time)
        raise http_grid.ObjectPullError(object_ids[0], "no")

    monkeypatch.setattr(http_grid, "pull_objects", fetch)
    bound(grid)
    bound(grid)  # a second run in one process
    list(grid.pull_messages(["a"]))
    with awaited_until(time.monotonic() + 50):
        list(grid.pull_messages(["a"]))
    with awaited_until(time.monotonic() - 50):
        list(grid.pull_messages(["a"]))
    assert given == [7200, pytest.approx(50, abs=5), 0.1]


def test_a_grid_that_fetches_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for other in (lambda ids: {}, None):  # a release without the limit, or without the function
        monkeypatch.setattr(http_grid, "pull_objects", other)
        bound(HttpGrid(token="none"))
        assert http_grid.pull_objects is other
