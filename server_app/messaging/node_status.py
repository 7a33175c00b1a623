"""Tracks which nodes can be asked: they owe no answer, are connected, and have not sent invalid replies repeatedly.

A node that owes an answer gets only the roll call until it answers anything, so it costs one
deadline and no more. An unknown node gets the roll call too: if it hosts tasks of a node that is
away, it takes that node's place, because a device that restarts may have a new node id; if it hosts
tasks that nobody has, these join the training (`joining`). All of this happens between the rounds,
and no round waits for it.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable
from logging import INFO

from flwr.app import Message, Metadata, RecordDict
from flwr.serverapp import Grid

from quickbloom.common.config.run import RunConfig
from quickbloom.common.flower.names import log
from quickbloom.common.flower.upload_deadline import awaited_until
from quickbloom.common.wire.messages import WireError
from quickbloom.common.wire.roll_call import CONSTANTS, ROLL_CALL, ConstantsReply, RollCallReply, roll_call_request, tell_agreed
from quickbloom.server_app.events.channel import Warn, warn_in_log
from quickbloom.server_app.messaging.admission import other_constants
from quickbloom.server_app.messaging.clock import REAL, Clock
from quickbloom.server_app.messaging.failures import SILENT, failure, is_gone
from quickbloom.server_app.messaging.joining import Joining
from quickbloom.server_app.messaging.population import Population
from quickbloom.server_app.messaging.refusing import tell_refused

_MOST_BAD_REPLIES = 3
_PAUSE = 1.0
"""Least seconds between two looks for new nodes while others work."""
_FORGET = 3600.0
"""Seconds after which Flower itself forgets a message."""


class Reachability:
    """The state of every node. `patience`: seconds until a node that does not answer the roll call is called again.

    `population.homes` follows tasks that return on another node. `connected`: how many nodes there were at the last look.
    """

    def __init__(
        self,
        population: Population,
        patience: float,
        warn: Warn = warn_in_log,
        joining: Joining | None = None,
        clock: Clock = REAL,
    ) -> None:
        self._clock = clock
        self._population = population
        self._joining = joining or Joining(population, RunConfig(join=False))
        self._patience = patience
        self._warn = warn
        # A node that was silent, or not reached, when the run began may still join.
        refused = {node_id for node_id, why in population.refused.items() if not (is_gone(why) or why.startswith(SILENT))}
        self._known = population.nodes | refused | set(population.homes.values())
        self._connected = set(self._known)
        self.connected = len(self._connected)
        self._away: set[int] = set()
        self._bad: Counter[int] = Counter()
        self._owed: dict[str, tuple[int, float]] = {}
        self._called: dict[str, tuple[int, float]] = {}
        self._unproven: dict[int, RollCallReply] = {}
        """Answers of unknown nodes whose constants are not known yet."""
        self._waiting = dict(population.arrived)
        self._waits: dict[int, float] = {}
        """Since when a node waits for the tasks of another one."""
        self._hearing: set[int] = set()
        """Nodes that understand a refusal, by their answer to the roll call of this run."""
        self._refused: dict[int, str] = {}
        """Reasons that nodes have not been told yet, and below those that they have."""
        self._told: dict[int, str] = {}
        self._looked = -math.inf
        self.late: Counter[int] = Counter()

    @property
    def away(self) -> list[int]:
        """Return the nodes that host tasks but cannot be asked."""
        return sorted(node_id for node_id in set(self._population.homes.values()) if not self.can_be_asked(node_id))

    def can_be_asked(self, node_id: int) -> bool:
        """Return whether this node is worth sending work to."""
        return node_id in self._connected and node_id not in self._away and not self.left_out(node_id)

    def may_be_there(self, node_id: int) -> bool:
        """Return whether this node is connected and not left out, even if it owes an answer."""
        return node_id in self._connected and not self.left_out(node_id)

    def left_out(self, node_id: int) -> bool:
        return self._bad[node_id] >= _MOST_BAD_REPLIES

    def owes(self, sent: Metadata) -> None:
        """Note that the reply to this message was not waited for, or did not arrive in time."""
        self._owed[sent.message_id] = sent.dst_node_id, self._clock.now()
        self._away.add(sent.dst_node_id)

    def lost(self, node_id: int) -> None:
        """Note that this node is gone, according to Flower."""
        self._away.add(node_id)

    def sent_nonsense(self, node_id: int) -> str:
        """Count an invalid reply, and return what to add to the reason of its failure."""
        self._bad[node_id] += 1
        return f"; after {_MOST_BAD_REPLIES} such replies it is left out" if self.left_out(node_id) else ""

    def refresh(self, grid: Grid) -> None:
        """Update the connected nodes, collect late replies, and call nodes that are unknown or owe an answer. Never waits."""
        connected = set(grid.get_node_ids())
        for node_id in sorted(self._connected - connected):
            log(INFO, "Node %s is not connected any more", node_id)
        # A node that was cut off may still have work: it is called before it is asked.
        self._away |= self._known - connected
        self._connected, self.connected = connected, len(connected)
        with awaited_until(time.monotonic()):  # an incomplete reply is given up, and the node called again
            self._collect_late(grid)
            self._collect_answers(grid)
        for answers in (self._waiting, self._unproven):  # a node that has gone since is called again
            for node_id in answers.keys() - connected:
                del answers[node_id]
        self._admit()
        self._tell_refused(grid)
        self._call(grid, connected)

    def _tell_refused(self, grid: Grid) -> None:
        """Tell nodes what they have not been told yet."""
        news = {node_id: reason for node_id, reason in self._refused.items() if self._told.get(node_id) != reason}
        self._refused.clear()
        self._told |= news
        tell_refused(grid, news, self._hearing & self._connected)

    def _collect_late(self, grid: Grid) -> None:
        for reply in grid.pull_messages(list(self._owed)) if self._owed else []:
            node_id, _ = self._owed.pop(reply.metadata.reply_to_message_id, (None, 0.0))
            if node_id is not None and not reply.has_error():
                self.late[node_id] += 1
                self._back(node_id)
        self._owed = self._recent(self._owed, _FORGET)

    def _collect_answers(self, grid: Grid) -> None:
        for reply in grid.pull_messages(list(self._called)) if self._called else []:
            node_id, _ = self._called.pop(reply.metadata.reply_to_message_id, (None, 0.0))
            if node_id is None or reply.has_error():
                continue
            if reason := failure(reply) or self._take_answer(node_id, reply.content):
                self._refuse(node_id, reason)
        self._called = self._recent(self._called, self._patience)

    def _take_answer(self, node_id: int, records: RecordDict) -> str:
        """Take in an answer to the roll call, or to the question that follows it. Returns why it cannot be used, or ""."""
        expected = self._population.constants
        try:
            if answer := self._unproven.get(node_id):
                if reason := other_constants(ConstantsReply.from_records(records).digest, expected):
                    return reason
                del self._unproven[node_id]
                self._waiting[node_id] = answer
                return ""
            answer = RollCallReply.from_records(records)
            if answer.hears:
                self._hearing.add(node_id)
        except WireError as error:
            return f"its answer to the roll call is of no use: {error}"
        # A node of the run has been asked for its constants before.
        (self._unproven if expected and node_id not in self._known else self._waiting)[node_id] = answer
        return ""

    def _admit(self) -> None:
        """Admit nodes that answered the roll call: in their old place, in that of a node that is away, or with new tasks."""
        for node_id, answer in sorted(self._waiting.items()):
            offer = self._joining.offer(node_id, answer, self.can_be_asked)
            if not offer.refusal and self._must_wait(node_id, offer.known):
                continue
            known = node_id in self._known or not offer.new
            if reason := offer.refusal or self._joining.admit(node_id, offer, answer):
                self._refuse(node_id, reason)
            else:
                self._back(node_id, new=not known)
            self._waiting.pop(node_id, None)

    def _must_wait(self, node_id: int, task_ids: Iterable[str]) -> bool:
        """Return whether another node has one of these tasks and is there: the node may be that one under a new id."""
        homes = self._population.homes
        for task_id in task_ids:
            if (home := homes[task_id]) != node_id and self.can_be_asked(home):
                since = self._waits.setdefault(node_id, self._clock.now())
                if self._clock.now() - since > self._patience:
                    self._refused[node_id] = twice = self._joining.twice(task_id)
                    self._warn(f"Node {node_id} waits until node {home} is away: {twice}")
                return True
        self._waits.pop(node_id, None)
        return False

    def greet(self, grid: Grid) -> None:
        """Call nodes that are unknown, at most once a second: for the time in which others work. Never waits."""
        if self._clock.now() - self._looked >= _PAUSE:
            there = set(grid.get_node_ids())
            self.connected = len(there)
            self._call(grid, there - self._known)

    def _call(self, grid: Grid, connected: Iterable[int]) -> None:
        self._looked = self._clock.now()
        hosts = set(self._population.homes.values())
        called = {node_id for node_id, _ in self._called.values()} | self._waiting.keys()
        wanted = [
            node_id
            for node_id in sorted(connected)
            if node_id not in called and not self.left_out(node_id)
            if node_id not in self._known or (node_id in hosts and node_id in self._away)
        ]
        if not wanted:
            return
        messages = [self._question(node_id) for node_id in wanted]
        for message_id, node_id in zip(grid.push_messages(messages), wanted, strict=False):
            if message_id:
                self._called[message_id] = node_id, self._clock.now()

    def _question(self, node_id: int) -> Message:
        """Return the roll call for a node, or what is still to be asked of one that answered it."""
        schema = self._population.schema
        if node_id not in self._unproven:
            return Message(roll_call_request(schema, self._population.scales), node_id, ROLL_CALL)
        records = RecordDict({})
        tell_agreed(records, schema, self._population.scales)
        return Message(records, node_id, CONSTANTS)

    def _refuse(self, node_id: int, reason: str) -> None:
        self._waiting.pop(node_id, None)
        self._unproven.pop(node_id, None)
        self._refused[node_id] = reason
        if node_id not in self._known:
            self._warn(f"Node {node_id} does not take part: {reason}")
            self._joining.refuse(node_id, reason)
            self._known.add(node_id)

    def _back(self, node_id: int, *, new: bool = False) -> None:
        if not new and (node_id in self._away or node_id not in self._known):
            log(INFO, "Node %s is back", node_id)
        self._known.add(node_id)
        self._away.discard(node_id)

    def _recent(self, messages: dict[str, tuple[int, float]], seconds: float) -> dict[str, tuple[int, float]]:
        now = self._clock.now()
        return {message_id: (node_id, sent) for message_id, (node_id, sent) in messages.items() if now - sent < seconds}
