"""A Grid without a network: all nodes live in this process, and every message goes straight to the real ClientApp.

Server, client and result are the same as everywhere. Flower's runtime is missing, so nothing is
started and a round costs little more than its arithmetic. Where rounds take long, nodes are computed by
worker processes, see `worker_processes`, or on other machines.
"""

import copy
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from quickbloom.common.flower import names
from quickbloom.server_app.messaging.worker_processes import Workers, Worth, most

CLIENT_APP = "quickbloom.client_app.app"
"""Found by name, as Flower finds it: the server's code does not depend on the clients'."""

_FIRST_NODE = 100


class Processes(Protocol):
    """Processes that answer messages in place of the run's: `worker_processes`, or others anywhere."""

    @property
    def number(self) -> int:
        """How many there are."""

    @property
    def cpu_seconds(self) -> float:
        """Processor seconds of all of them, up to their last replies."""

    def replies(self, messages: Sequence[Message]) -> Iterator[tuple[Message, Message | None]]:
        """Yield every message with its reply, as they come. Raises RunError if they cannot go on."""

    def close(self) -> None:
        """End them."""


Elsewhere = Callable[[Mapping[int, Context]], Processes]
"""Starts processes for nodes with these contexts, by node id; whoever computes a node changes its context."""


def client_app() -> ClientApp:
    """Return the ClientApp, in a process that Flower has not started."""
    if identity := names.find("TaskIdentity"):  # required by Flower's messages
        identity.run_id, identity.task_id, identity.node_id = 1, 1, 1
    app: ClientApp = import_module(CLIENT_APP).app
    return app


def answered(app: ClientApp, message: Message, context: Context | None) -> Message | None:
    """Return the reply of the node whose context this is, which changes it; an error reply from a node that does not exist."""
    try:
        if context is None:
            raise KeyError(message.metadata.dst_node_id)
        # With its own records, as over a network: a node may take them apart.
        handed = copy.copy(message)
        handed.content = RecordDict(dict(message.content))
        return app(handed, context)
    except Exception as error:  # as Flower's node does: an exception becomes an error reply
        return Message(Error(code=0, reason=f"{type(error)}:<'{error}'>"), reply_to=message)


class InlineGrid(Grid):
    """A grid of `num_nodes` nodes with ids 100, 101, ...; node i hosts partition i. Their state lasts as long as the grid.

    As a context it ends its worker processes. `workers`: how many compute the nodes from the second round on; 1: this process
    alone; None: as many as there are cores and nodes, once that pays. `elsewhere`: computes the nodes from the beginning.
    """

    def __init__(
        self,
        num_nodes: int,
        run_config: Mapping[str, Any],
        node_configs: Mapping[int, Mapping[str, Any]],
        workers: int | None = 1,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._app = client_app()
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
        self._most = most(num_nodes) if workers is None else min(workers, num_nodes)
        self._worth = Worth(at_once=workers is not None)
        self._workers: Processes | None = elsewhere(self._contexts) if elsewhere else None

    def __enter__(self) -> "InlineGrid":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._workers is not None:
            self._workers.close()

    @property
    def processes(self) -> int:
        """How many processes compute the nodes: 1 for this one."""
        return 1 if self._workers is None else self._workers.number

    @property
    def cpu_seconds(self) -> float:
        """Processor seconds of the worker processes."""
        return 0.0 if self._workers is None else self._workers.cpu_seconds

    def answer(self, message: Message) -> Message | None:
        """Return the reply of the node that a message is addressed to; None if there is none."""
        return answered(self._app, message, self._contexts.get(message.metadata.dst_node_id))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        listed = list(messages)
        for message in listed:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        replies = self._workers.replies(listed) if self._workers else self._answered_here(listed)
        for message, reply in replies:
            if reply is not None:
                self._replies[message.metadata.message_id] = reply
        if self._workers is None and self._most > 1 and self._worth.proven:
            states = {node_id: context.state for node_id, context in self._contexts.items()}
            self._workers = Workers(self._most, self.get_node_ids(), self.answer, states)
        return [message.metadata.message_id for message in listed]

    def _answered_here(self, messages: list[Message]) -> Iterator[tuple[Message, Message | None]]:
        """Yield every message with its reply, and note what workers would have saved."""
        shares = dict.fromkeys(range(self._most), 0.0)
        for message in messages:
            started = time.perf_counter()
            yield message, self.answer(message)
            shares[(message.metadata.dst_node_id - _FIRST_NODE) % self._most] += time.perf_counter() - started
        if messages and self._most > 1:
            self._worth.note(messages[0].metadata.message_type, shares.values(), messages)

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
