"""Messages to the nodes and their replies: who was asked what, what came back, what was of no use and why.

One bad reply costs that reply: it is named, counted, and held against its node, never raised.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from logging import WARNING
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common import log
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from common.config import RunConfig
from common.errors import as_told
from common.wire import TRAIN, WireError, payload_bytes
from server_app.polling import PollingGrid
from server_app.reachability import Reachability
from server_app.rollcall import Population, failure


class TooFewError(Exception):
    """Too few nodes or training tasks contributed to a round; the text says how many, and why."""


@dataclass
class Round:
    """What one round has seen so far, and the line that the history gets from it."""

    started: float = field(default_factory=time.monotonic)
    record: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    asked: int = 0
    answered: int = 0
    trained: set[int] = field(default_factory=set)
    """Nodes whose answer to training was of use."""


class Exchange:
    """The messages of one run. `nodes`: who can be asked; `round`: what the current round has seen; `sent`: what is open."""

    def __init__(self, config: RunConfig, population: Population) -> None:
        self._config = config
        self._population = population
        self.nodes = Reachability(population, config.node_deadline)
        self.round = Round()
        self.sent: list[Message] = []
        self.asked: dict[int, list[str]] = {}

    def begin(self) -> None:
        """A new round: nothing was seen yet."""
        self.round = Round()

    def hosts(self, task_ids: Iterable[str], *, final: bool = False) -> dict[int, list[str]]:
        """The tasks by node, for every node that can be asked; `final`: also for those that owe an answer."""
        by_node: dict[int, list[str]] = {}
        for task_id in task_ids:
            node_id = self._population.homes[task_id]
            if self.nodes.can_be_asked(node_id) or (final and self.nodes.may_be_there(node_id)):
                by_node.setdefault(node_id, []).append(task_id)
        return by_node

    def address(self, by_node: Mapping[int, list[str]], kind: str, number: int, request: "Request") -> list[Message]:
        """One message of this kind to each node; `request(node, its tasks)` is what it says."""
        self.sent, self.asked = [], dict(by_node)
        for node_id, part in by_node.items():
            message = Message(request(node_id, part), node_id, kind, group_id=str(number))
            self.round.asked += 1
            self.round.bytes_down += payload_bytes(message.content)
            self.sent.append(message)
        return list(self.sent)

    def send(self, grid: Grid, messages: list[Message], timeout: float | None, enough: int | None) -> Iterable[Message]:
        """Send, and give the replies as they come; no more are waited for once so many tasks are answered for."""
        if not isinstance(grid, PollingGrid):
            return grid.send_and_receive(messages, timeout=timeout)
        if enough is None:
            return grid.replies(messages, timeout)
        answered = 0
        nodes: dict[str, int] = {}

        def are_enough(reply: Message) -> bool:
            nonlocal answered
            # Not before: Flower gives a message its id when it is pushed.
            nodes.update({} if nodes else {sent.metadata.message_id: sent.metadata.dst_node_id for sent in messages})
            if failure(reply) is None:
                answered += len(self.asked[nodes[reply.metadata.reply_to_message_id]])
            return answered >= enough

        return grid.replies(messages, timeout, are_enough)

    def receive(
        self, replies: Iterable[Message], read: "Read", *, opened: "Opened | None" = None, enough: int | None = None
    ) -> None:
        """Hand every reply to `read` with its node and the tasks asked for; count and name what is of no use.

        Replies are taken in the order of the requests, so that sums do not depend on which node was faster. `opened` gets each
        as soon as it comes, and what it returns is kept in place of the message: `read` gets that. Once `enough` tasks are
        answered for, nobody is reproached for not having answered yet.
        """
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in self.sent}
        by_request: dict[str, _Came] = {}
        for came in replies:
            request = came.metadata.reply_to_message_id
            # Nobody answers for somebody else; that a node is not there is said in its place.
            if came.has_error() or came.metadata.src_node_id == asked.get(request):
                by_request[request] = _look_at(came, self.asked.get(asked.get(request, 0), []), opened)
            del came  # before the next one comes
        good = sum(
            len(self.asked[node_id]) for key, node_id in asked.items() if key in by_request and not by_request[key].failure
        )
        spare = enough is not None and good >= enough
        for message in self.sent:
            node_id = message.metadata.dst_node_id
            reply = by_request.pop(message.metadata.message_id, None)
            if reply is None:
                self.nodes.owes(message)
                if not spare:
                    deadline = self._config.round_deadline
                    self.fail(f"node {node_id}", f"it sent no reply within `round-deadline` ({deadline:g} s)")
            elif reply.failure is not None:
                self.fail(f"node {node_id}", reply.failure)
                if reply.not_there:
                    self.nodes.lost(node_id)
            else:
                self.round.answered += 1
                self.round.bytes_up += reply.size
                try:
                    if reply.trouble:
                        raise WireError(reply.trouble)
                    read(node_id, reply.content, self.asked[node_id])
                    if message.metadata.message_type == TRAIN:
                        self.round.trained.add(node_id)
                except WireError as error:
                    self.blame(node_id, f"its reply is of no use: {error}")
        self.sent = []

    def blame(self, node_id: int, reason: str) -> None:
        """A failure that is held against its node: after three of them it is left out."""
        more = self.nodes.sent_nonsense(node_id)
        self.fail(f"node {node_id}", f"{reason}{more}")

    def too_few(self, what: str) -> TooFewError:
        """The error for a round to which too few contributed, with all that went wrong in it."""
        reasons = sorted({failure["reason"] for failure in self.round.failures})
        if away := self.nodes.away:
            reasons.append(f"{len(away)} nodes are away or left out, among them node {away[0]}")
        return TooFewError(f"{what}: {'; '.join(reasons) or 'nothing was wrong'}")

    def fail(self, who: str, reason: str) -> None:
        """Name and count what went wrong."""
        who, reason = as_told(who), as_told(reason, 600)
        log(WARNING, "%s: %s", who.capitalize(), reason)
        self.round.failures.append({"who": who, "reason": reason})


Request = Callable[[int, list[str]], RecordDict]
Opened = Callable[[RecordDict, list[str]], Any]
Read = Callable[[int, Any, list[str]], None]


@dataclass(frozen=True)
class _Came:
    """What is kept of a reply until all are there. `content`: as it was opened; `trouble`: why it could not be."""

    failure: str | None
    not_there: bool = False
    size: int = 0
    content: Any = None
    trouble: str = ""


def _look_at(reply: Message, task_ids: list[str], opened: Opened | None) -> _Came:
    if (reason := failure(reply)) is not None:
        return _Came(reason, reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE)
    size = payload_bytes(reply.content)
    try:
        return _Came(None, size=size, content=opened(reply.content, task_ids) if opened else reply.content)
    except WireError as error:
        return _Came(None, size=size, trouble=str(error))  # the error itself would hold the reply in its frames
