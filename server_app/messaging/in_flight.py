"""Messages that wait for their replies while others are sent: a node has one at a time."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, Metadata
from flwr.serverapp import Grid

from quickbloom.server_app.messaging.clock import clock_of
from quickbloom.server_app.messaging.polling_grid import arrivals


@dataclass
class Sent:
    """A message that was sent. `task_ids`: what was asked for; `version`: of the model in it; `turns`: see `Turns`."""

    metadata: Metadata
    task_ids: list[str]
    version: int
    turns: list[tuple[int, str]] = field(default_factory=list)
    at: float = 0.0

    @property
    def node_id(self) -> int:
        """The node that it was sent to."""
        return self.metadata.dst_node_id


class InFlight:
    """The messages of one run that have no reply yet. Replies are handed out one by one, in the order in which they came."""

    def __init__(self, grid: Grid, deadline: float) -> None:
        self._grid = grid
        self._deadline = deadline
        self._clock = clock_of(grid)
        self._sent: dict[str, Sent] = {}
        self._came: deque[tuple[Sent, Message]] = deque()

    @property
    def sent(self) -> list[Sent]:
        """All messages whose replies were not handed out yet."""
        return [*self._sent.values(), *(sent for sent, _ in self._came)]

    @property
    def nodes(self) -> set[int]:
        """The nodes that have a message, and whose reply has not arrived."""
        return {sent.node_id for sent in self._sent.values()}

    def send(self, messages: Iterable[Message], sent: Mapping[int, Sent]) -> set[int]:
        """Send messages, and return the nodes in whose hands they are. `sent`: what is in each, by its node.

        A message that cannot be delivered is not in flight.
        """
        listed = list(messages)
        now = self._clock.now()
        delivered: set[int] = set()
        for message_id, message in zip(self._grid.push_messages(listed), listed, strict=True):
            if message_id:
                one = sent[message.metadata.dst_node_id]
                one.at = now
                self._sent[message_id] = one
                delivered.add(one.node_id)
        return delivered

    def next(self) -> tuple[Sent, Message] | None:
        """Return a message and its reply, of those that have arrived; None if there is none left."""
        return self._came.popleft() if self._came else None

    def wait(self, seconds: float) -> None:
        """Wait until a reply has arrived, for so many seconds at most."""
        if not self._sent:
            self._clock.sleep(seconds)
            return
        for reply in arrivals(self._grid, list(self._sent), seconds):
            sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
            if sent is not None:
                self._came.append((sent, reply))

    def expired(self) -> list[Sent]:
        """Return the messages without a reply in time, which are not waited for any more."""
        now = self._clock.now()
        gone = {message_id: sent for message_id, sent in self._sent.items() if now - sent.at >= self._deadline}
        self._sent = {message_id: sent for message_id, sent in self._sent.items() if message_id not in gone}
        return list(gone.values())
