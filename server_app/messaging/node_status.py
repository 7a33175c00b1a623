"""Tracks which nodes can be asked: they owe no answer, are connected, and have not sent invalid replies repeatedly.

A node that owes an answer gets only the roll call until it answers anything, so it costs one
deadline and no more. An unknown node gets the roll call too: if it hosts tasks of a node that is
away, it takes that node's place, because a device that restarts may have a new node id. All of this
happens between the rounds, and no round waits for it.
"""

import time
from collections import Counter
from collections.abc import Iterable
from logging import INFO

from flwr.app import Message, Metadata
from flwr.serverapp import Grid

from quickbloom.common.flower.names import log
from quickbloom.common.flower.upload_deadline import awaited_until
from quickbloom.common.wire.messages import WireError
from quickbloom.common.wire.roll_call import ROLL_CALL, RollCallReply, roll_call_request
from quickbloom.server_app.events.channel import Warn, warn_in_log
from quickbloom.server_app.messaging.clock import REAL, Clock
from quickbloom.server_app.messaging.failures import failure
from quickbloom.server_app.messaging.population import Population

_MOST_BAD_REPLIES = 3
_FORGET = 3600.0
"""Seconds after which Flower itself forgets a message."""


class Reachability:
    """The state of every node. `patience`: seconds until a node that does not answer the roll call is called again.

    `population.homes` follows tasks that return on another node.
    """

    def __init__(self, population: Population, patience: float, warn: Warn = warn_in_log, clock: Clock = REAL) -> None:
        self._clock = clock
        self._population = population
        self._patience = patience
        self._warn = warn
        self._known = population.nodes | population.refused.keys() | set(population.homes.values())
        self._connected = set(self._known)
        self._away: set[int] = set()
        self._bad: Counter[int] = Counter()
        self._owed: dict[str, tuple[int, float]] = {}
        self._called: dict[str, tuple[int, float]] = {}
        self._waiting: dict[int, RollCallReply] = {}
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
        self._connected = connected
        with awaited_until(time.monotonic()):  # an incomplete reply is given up, and the node called again
            self._collect_late(grid)
            self._collect_answers(grid)
        self._admit()
        self._call(grid, connected)

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
            if (reason := failure(reply)) is None:
                try:
                    self._waiting[node_id] = RollCallReply.from_records(reply.content)
                    continue
                except WireError as error:
                    reason = f"its answer to the roll call is of no use: {error}"
            self._refuse(node_id, reason)
        self._called = self._recent(self._called, self._patience)

    def _admit(self) -> None:
        """Admit nodes that answered the roll call: in their old place, or in that of a node that is away."""
        homes, tasks = self._population.homes, self._population.tasks
        for node_id, answer in list(self._waiting.items()):
            mine = {task.task_id for task in answer.tasks if tasks.get(task.task_id) == task}
            taken = {homes[task_id] for task_id in mine} - {node_id}
            if answer.spec != self._population.spec or not mine:
                self._refuse(node_id, "it hosts none of the tasks of this run; it can take part in the next one")
            elif not any(self.can_be_asked(other) for other in taken):
                homes.update(dict.fromkeys(mine, node_id))
                self._population.keepers |= {node_id} if answer.keeps else set()
                self._back(node_id)
            else:
                continue  # it waits until the node in its place is known to be away
            self._waiting.pop(node_id, None)

    def _call(self, grid: Grid, connected: Iterable[int]) -> None:
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
        messages = [
            Message(roll_call_request(self._population.agreed, self._population.scales), node_id, ROLL_CALL)
            for node_id in wanted
        ]
        for message_id, node_id in zip(grid.push_messages(messages), wanted, strict=False):
            if message_id:
                self._called[message_id] = node_id, self._clock.now()

    def _refuse(self, node_id: int, reason: str) -> None:
        self._waiting.pop(node_id, None)
        if node_id not in self._known:
            self._warn(f"Node {node_id} does not take part: {reason}")
            self._known.add(node_id)

    def _back(self, node_id: int) -> None:
        if node_id in self._away or node_id not in self._known:
            log(INFO, "Node %s is back", node_id)
        self._known.add(node_id)
        self._away.discard(node_id)

    def _recent(self, messages: dict[str, tuple[int, float]], seconds: float) -> dict[str, tuple[int, float]]:
        now = self._clock.now()
        return {message_id: (node_id, sent) for message_id, (node_id, sent) in messages.items() if now - sent < seconds}
