"""Messages to the nodes and their replies: who was asked what, what was returned, what was invalid and why.

An invalid reply costs only that reply: it is named, counted, and held against its node, never
raised.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, Metadata, RecordDict
from flwr.serverapp import Grid

from quickbloom.common.config.run import RunConfig
from quickbloom.common.errors import OneLineError, as_told
from quickbloom.common.flower import names
from quickbloom.common.wire.messages import TRAIN, WireError, payload_bytes
from quickbloom.common.wire.roll_call import tell_agreed
from quickbloom.server_app.events.channel import Events
from quickbloom.server_app.messaging.clock import REAL, Clock
from quickbloom.server_app.messaging.failures import UNFINISHED, failure
from quickbloom.server_app.messaging.joining import Joining
from quickbloom.server_app.messaging.node_status import Reachability
from quickbloom.server_app.messaging.phases import AGGREGATING, WAITING, Phases
from quickbloom.server_app.messaging.polling_grid import GridWithReplies, PollingGrid, are_large
from quickbloom.server_app.messaging.population import Population


class TooFewError(OneLineError):
    """Too few nodes or training tasks contributed to a round. The text says how many, and why."""


@dataclass
class Round:
    """State of one round, and the line of the history made from it."""

    phases: Phases = field(default_factory=Phases)
    record: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    asked: int = 0
    answered: int = 0
    trained: set[int] = field(default_factory=set)
    """Nodes with a valid answer to training."""


class Exchange:
    """The messages of one run.

    `nodes`: who can be asked; `joining`: who joins; `round`: state of the current round; `sent`: open messages.
    """

    def __init__(self, config: RunConfig, population: Population, events: Events | None = None, clock: Clock = REAL) -> None:
        self._config = config
        self._events = events or Events()
        self._population = population
        self.joining = Joining(population, config, self._events)
        self.nodes = Reachability(population, config.node_deadline, self._events.warn, self.joining, clock)
        self.round = Round()
        self.sent: list[Metadata] = []
        self._in_order = False
        self.asked: dict[int, list[str]] = {}

    def begin(self) -> None:
        """Begin a new round, with an empty state."""
        self.round = Round()

    def enter(self, phase: str) -> None:
        """Begin a phase of the current round."""
        self.round.phases.enter(phase)

    def hosts(self, task_ids: Iterable[str], *, final: bool = False) -> dict[int, list[str]]:
        """Return the tasks by node, for every node that can be asked; `final`: also for nodes that owe an answer."""
        by_node: dict[int, list[str]] = {}
        for task_id in task_ids:
            node_id = self._population.homes[task_id]
            if self.nodes.can_be_asked(node_id) or (final and self.nodes.may_be_there(node_id)):
                by_node.setdefault(node_id, []).append(task_id)
        return by_node

    def address(self, by_node: Mapping[int, list[str]], kind: str, number: int, request: "Request") -> list[Message]:
        """Return one message of this kind to each node, with content `request(node, its tasks)`. None is kept here."""
        self.sent, self.asked, self._in_order = [], dict(by_node), False
        messages = []
        for node_id, part in by_node.items():
            message = self.message(node_id, part, kind, number, request)
            self.sent.append(message.metadata)
            messages.append(message)
        return messages

    def message(self, node_id: int, part: list[str], kind: str, number: int, request: "Request") -> Message:
        """Return a message to one node, which counts as sent."""
        records = request(node_id, part)
        tell_agreed(records, self._population.schema_for(node_id), self._population.scales)
        message = Message(records, node_id, kind, group_id=str(number))
        self.round.asked += 1
        self.round.bytes_down += payload_bytes(message.content)
        return message

    def send(self, grid: Grid, messages: list[Message], timeout: float | None, enough: int | None) -> Iterable[Message]:
        """Send, and yield the replies as they arrive. Stop waiting once the answered tasks number `enough`.

        Meanwhile nodes that have come since are called, so that they can take part in the next round.
        """
        self.enter(WAITING)  # where nodes are in this process, they compute when they are asked
        if not isinstance(grid, GridWithReplies):
            return grid.send_and_receive(messages, timeout=timeout)
        if enough is None:
            self._in_order = isinstance(grid, PollingGrid) and are_large(messages)
            return self._greeting(grid, grid.replies(messages, timeout))
        answered, all_sent = 0, self.sent
        nodes: dict[str, int] = {}

        def are_enough(reply: Message) -> bool:
            nonlocal answered
            # Not before: Flower gives a message its id when it is pushed.
            nodes.update({} if nodes else {sent.message_id: sent.dst_node_id for sent in all_sent})
            if failure(reply) is None:
                answered += len(self.asked[nodes[reply.metadata.reply_to_message_id]])
            return answered >= enough

        return self._greeting(grid, grid.replies(messages, timeout, are_enough))

    def _greeting(self, grid: Grid, replies: Iterator[Message]) -> Iterator[Message]:
        self.enter(WAITING)
        for reply in replies:
            self.enter(AGGREGATING)
            yield reply
            del reply  # before the next one arrives
            self.enter(WAITING)
            self.nodes.greet(grid)
        self.enter(AGGREGATING)

    def receive(
        self, replies: Iterable[Message], read: "Read", *, opened: "Opened | None" = None, enough: int | None = None
    ) -> None:
        """Hand every reply to `read` with its node and the requested tasks; count and name invalid ones.

        Replies are handed over in the order of the requests, so that sums do not depend on which
        node was faster, and each as soon as its turn has come. `opened` gets each reply on arrival;
        its result replaces the message, and `read` gets this result. Once `enough` tasks are
        answered for, missing answers are no failures.
        """
        sent, self.sent = self.sent, []
        places = {metadata.message_id: place for place, metadata in enumerate(sent)}
        came: dict[int, _Came] = {}
        turn = good = 0
        missing: list[Metadata] = []
        for reply in replies:
            place = places.get(reply.metadata.reply_to_message_id)
            # A node can neither answer for another nor answer twice. An error, such as a lost node, may come from elsewhere.
            if (
                place is not None
                and place >= turn
                and (reply.has_error() or reply.metadata.src_node_id == sent[place].dst_node_id)
            ):
                tasks = self.asked[sent[place].dst_node_id]
                came[place] = _look_at(reply, tasks, opened)
                good += 0 if came[place].failure else len(tasks)
                if self._in_order:  # the replies before it will not arrive any more
                    missing += sent[turn:place]
                    turn = max(turn, place)
            del reply  # before the next reply arrives
            while turn in came:
                self._take(sent[turn], self.asked[sent[turn].dst_node_id], came.pop(turn), read)
                turn += 1
        for place in range(turn, len(sent)):
            if place in came:
                self._take(sent[place], self.asked[sent[place].dst_node_id], came.pop(place), read)
            else:
                missing.append(sent[place])
        for metadata in missing:
            self._miss(metadata, spare=enough is not None and good >= enough)

    def receive_one(
        self, sent: Metadata, task_ids: list[str], reply: Message, read: "Read", *, opened: "Opened | None" = None
    ) -> None:
        """Hand the reply to one message about these tasks to `read`, or name what is wrong with it, as `receive` does."""
        if not reply.has_error() and reply.metadata.src_node_id != sent.dst_node_id:
            self.fail(f"node {sent.dst_node_id}", "another node answered in its place")
            return
        self._take(sent, task_ids, _look_at(reply, task_ids, opened), read)

    def miss(self, sent: Metadata) -> None:
        """Name a node that did not reply within `round-deadline`; it owes an answer."""
        self._miss(sent, spare=False)

    def _take(self, sent: Metadata, task_ids: list[str], reply: "_Came", read: "Read") -> None:
        """Hand a reply on, or name what is wrong with it."""
        node_id = sent.dst_node_id
        if reply.failure is not None:
            unfinished = f" (`round-deadline` is {self._config.round_deadline:g} s)" if reply.failure == UNFINISHED else ""
            # With privacy a round continues without replies, so nodes that only report errors must come to an end.
            if self._config.privacy.on and sent.message_type == TRAIN and not reply.not_there:
                self.blame(node_id, reply.failure + unfinished)
            else:
                self.fail(f"node {node_id}", reply.failure + unfinished)
            if reply.not_there:
                self.nodes.lost(node_id)
            return
        self.round.answered += 1
        self.round.bytes_up += reply.size
        try:
            if reply.trouble:
                raise WireError(reply.trouble)
            read(node_id, reply.content, task_ids)
            if sent.message_type == TRAIN:
                self.round.trained.add(node_id)
        except WireError as error:
            self.blame(node_id, f"its reply is of no use: {error}")

    def _miss(self, sent: Metadata, *, spare: bool) -> None:
        self.nodes.owes(sent)
        if not spare:
            deadline = self._config.round_deadline
            self.fail(f"node {sent.dst_node_id}", f"it sent no reply within `round-deadline` ({deadline:g} s)")

    def blame(self, node_id: int, reason: str) -> None:
        """Record a failure that counts against its node, which is left out after three."""
        more = self.nodes.sent_nonsense(node_id)
        self.fail(f"node {node_id}", f"{reason}{more}")

    def too_few(self, what: str) -> TooFewError:
        """Return the error for a round with too few contributions, with all its failures."""
        reasons = sorted({failure["reason"] for failure in self.round.failures})
        if away := self.nodes.away:
            reasons.append(f"{len(away)} nodes are away or left out, among them node {away[0]}")
        return TooFewError(f"{what}: {'; '.join(reasons) or 'nothing was wrong'}")

    def fail(self, who: str, reason: str) -> None:
        """Name and count a failure."""
        who, reason = as_told(who), as_told(reason, 600)
        self._events.fail(who, reason)
        self.round.failures.append({"who": who, "reason": reason})


# Flower has discarded the reply slot of the second kind, so no reply can be owed: call the node before it is asked again.
_NOT_THERE = (names.NODE_UNAVAILABLE, names.MESSAGE_UNAVAILABLE)

Request = Callable[[int, list[str]], RecordDict]
Opened = Callable[[RecordDict, list[str]], Any]
Read = Callable[[int, Any, list[str]], None]


@dataclass(frozen=True)
class _Came:
    """The kept part of a reply until all are there. `content`: as it was opened; `trouble`: why it could not be opened."""

    failure: str | None
    not_there: bool = False
    size: int = 0
    content: Any = None
    trouble: str = ""


def _look_at(reply: Message, task_ids: list[str], opened: Opened | None) -> _Came:
    if (reason := failure(reply)) is not None:
        return _Came(reason, reply.has_error() and reply.error.code in _NOT_THERE)
    size = payload_bytes(reply.content)
    try:
        return _Came(None, size=size, content=opened(reply.content, task_ids) if opened else reply.content)
    except WireError as error:
        return _Came(None, size=size, trouble=str(error))  # the error itself would keep the reply alive in its frames
