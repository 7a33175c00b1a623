"""A Grid without a network: every message goes straight to the real ClientApp in this process.

The transport is faked, the maths is not. `faults` replaces the answer of chosen nodes, to play broken clients.
"""

import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import app

Fault = Callable[[Message, Callable[[Message], Message]], Message | None]


class LoopbackGrid(Grid):
    """`num_nodes` nodes with ids 100, 101, ...; node i hosts partition i. A fault that returns None never answers."""

    def __init__(
        self,
        num_nodes: int,
        run_config: Mapping[str, Any],
        faults: Mapping[int, Fault] | None = None,
        node_configs: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.node_ids = [100 + i for i in range(num_nodes)]
        self.requests: list[Message] = []
        self._faults = dict(faults or {})
        self._replies: dict[str, Message] = {}
        self._contexts = {
            node_id: Context(
                run_id=1,
                node_id=node_id,
                node_config={"partition-id": i, "num-partitions": num_nodes, **(node_configs or {}).get(i, {})},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i, node_id in enumerate(self.node_ids)
        }

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            self.requests.append(message)
            node_id = message.metadata.dst_node_id
            fault = self._faults.get(node_id - 100)
            reply = fault(message, self._answer) if fault else self._answer(message)
            if reply is not None:
                self._replies[message.metadata.message_id] = reply
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(message_id) for message_id in list(message_ids) if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def get_node_ids(self) -> list[int]:
        return self.node_ids

    def _answer(self, message: Message) -> Message:
        try:
            return app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # as Flower's node does: an exception becomes an error reply
            return Message(Error(code=0, reason=f"{type(error)}:<'{error}'>"), reply_to=message)

    def set_run(self, run: Run) -> None:
        raise AssertionError("a loopback grid has no run")

    @property
    def run(self) -> Run:
        raise AssertionError("a loopback grid has no run")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
