"""A Grid without a network: all nodes live in this process, and every message goes straight to the real ClientApp.

Server, client and result are the same as everywhere. Flower's runtime is missing, so nothing is
started and a round costs little more than its arithmetic. For many short rounds, comparisons and
tests.
"""

import copy
import uuid
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from quickbloom.common.flower import names

CLIENT_APP = "quickbloom.client_app.app"
"""Found by name, as Flower finds it: the server's code does not depend on the clients'."""

_FIRST_NODE = 100


class InlineGrid(Grid):
    """A grid of `num_nodes` nodes with ids 100, 101, ...; node i hosts partition i. Their state lasts as long as the grid."""

    def __init__(self, num_nodes: int, run_config: Mapping[str, Any], node_configs: Mapping[int, Mapping[str, Any]]) -> None:
        if identity := names.find("TaskIdentity"):  # required by Flower's messages
            identity.run_id, identity.task_id, identity.node_id = 1, 1, 1
        self._app: ClientApp = import_module(CLIENT_APP).app
        self._replies: dict[str, Message] = {}
        self._contexts = {
            _FIRST_NODE + i: Context(
                run_id=1,
                node_id=_FIRST_NODE + i,
                node_config={"partition-id": i, "num-partitions": num_nodes, **node_configs.get(i, {})},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i in range(num_nodes)
        }

    def answer(self, message: Message) -> Message | None:
        """Return the reply of the node that a message is addressed to; None if there is none."""
        try:
            # With its own records, as over a network: a node may take them apart.
            handed = copy.copy(message)
            handed.content = RecordDict(dict(message.content))
            return self._app(handed, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # as Flower's node does: an exception becomes an error reply
            return Message(Error(code=0, reason=f"{type(error)}:<'{error}'>"), reply_to=message)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            ids.append(message.metadata.message_id)
            if (reply := self.answer(message)) is not None:
                self._replies[message.metadata.message_id] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(message_id) for message_id in list(message_ids) if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError("nodes in this process belong to no run of Flower")

    @property
    def run(self) -> Any:
        raise NotImplementedError("nodes in this process belong to no run of Flower")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
