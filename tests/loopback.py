"""The grid without a network, with faults: chosen nodes' answers are replaced, to play broken clients.

The transport is faked, the maths is not.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Message

from quickbloom.server_app.messaging.in_process_grid import InlineGrid

Fault = Callable[[Message, Callable[[Message], Message]], Message | None]


class LoopbackGrid(InlineGrid):
    """`num_nodes` nodes with ids 100, 101, ...; node i hosts partition i. A fault that returns None never answers."""

    def __init__(
        self,
        num_nodes: int,
        run_config: Mapping[str, Any],
        faults: Mapping[int, Fault] | None = None,
        node_configs: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(num_nodes, run_config, node_configs or {})
        self.node_ids = super().get_node_ids()
        self.requests: list[Message] = []
        self._faults = dict(faults or {})

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        listed = list(messages)
        self.requests += listed
        return super().push_messages(listed)

    def get_node_ids(self) -> list[int]:
        return self.node_ids

    def answer(self, message: Message) -> Message | None:
        fault = self._faults.get(message.metadata.dst_node_id - 100)
        return fault(message, super().answer) if fault else super().answer(message)  # type: ignore[arg-type]
