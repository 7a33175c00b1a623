"""A grid of simulated devices: messages are answered at once, and their replies arrive when slow devices would be done.

Time is virtual. It passes when the server waits, and then straight to the next reply, so that a day of a thousand devices
takes as long as its arithmetic. Events of the same instant come in the order in which their messages were sent. Only
training takes time, and only devices that host training tasks are ever away: scores are the experimenter's, who sees all.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from quickbloom.common.wire.messages import TRAIN
from quickbloom.common.wire.roll_call import ROLL_CALL
from quickbloom.server_app.messaging.devices import Device


class VirtualClock:
    """Seconds since the midnight before the run."""

    virtual = True

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += max(0.0, seconds)


class VirtualGrid(Grid):
    """`grid`: answers the messages. Until `begin`, and after `end`, everything is there and nothing takes time."""

    def __init__(self, grid: Grid) -> None:
        self.inner = grid
        self.clock = VirtualClock()
        self._devices: Mapping[int, Device] = {}
        self._due: dict[str, float] = {}
        self._busy: dict[int, float] = {}
        self._last: dict[int, str] = {}

    def begin(self, devices: Mapping[int, Device], seconds: float = 0.0) -> None:
        """From now on these nodes are slow, and it is so many seconds after midnight; later, if none of them is there then."""
        self._devices = devices
        self.clock.seconds = min((device.back(seconds) for device in devices.values()), default=seconds)

    def end(self) -> None:
        """From now on nothing takes time any more; what was not done is done now."""
        self._devices = {}
        self._due = dict.fromkeys(self._due, 0.0)

    def get_node_ids(self) -> list[int]:
        """Return the nodes whose devices are there now."""
        now = self.clock.now()
        return [n for n in self.inner.get_node_ids() if n not in self._devices or self._devices[n].is_there(now)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send, and return the ids. "": a device that computes does not answer the roll call, as a real one does not."""
        listed = list(messages)
        now = self.clock.now()
        reached = [message for message in listed if not self._computes(message, now)]
        tasks = [_tasks(message) for message in reached]
        ids = list(self.inner.push_messages(reached))
        for message_id, message, number in zip(ids, reached, tasks, strict=True):
            node_id = message.metadata.dst_node_id
            device = self._devices.get(node_id)
            if message_id and device is not None and number:
                self._forget(self._last.get(node_id, ""), now)
                begun = max(now, self._busy.get(node_id, 0.0))
                self._busy[node_id] = self._due[message_id] = device.finish(begun, number * device.seconds)
                self._last[node_id] = message_id
        by_message = dict(zip(map(id, reached), ids, strict=True))
        return [by_message.get(id(message), "") for message in listed]

    def _computes(self, message: Message, now: float) -> bool:
        """Return whether this is a roll call of a device that has work to finish."""
        node_id = message.metadata.dst_node_id
        busy = node_id in self._devices and self._busy.get(node_id, 0.0) > now
        return busy and message.metadata.message_type == ROLL_CALL

    def _forget(self, message_id: str, now: float) -> None:
        """Drop a reply that was there, and that nobody has fetched before its device got new work."""
        if self._due.get(message_id, math.inf) <= now:
            del self._due[message_id]
            self._all_of([message_id])

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived by now."""
        now = self.clock.now()
        due = [message_id for message_id in message_ids if message_id and self._due.get(message_id, 0.0) <= now]
        return self._all_of(due)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return list(self.replies(messages, timeout))

    def replies(
        self, messages: Iterable[Message], timeout: float | None = None, enough: Callable[[Message], bool] | None = None
    ) -> Iterator[Message]:
        """Send, then yield every reply when it arrives, for `timeout` virtual seconds, or until `enough` of one is True."""
        deadline = math.inf if timeout is None else self.clock.now() + timeout
        # Messages get their ids now, not when the first reply is asked for.
        return self._wait([message_id for message_id in self.push_messages(messages) if message_id], deadline, enough)

    def _wait(self, waiting: list[str], deadline: float, enough: Callable[[Message], bool] | None) -> Iterator[Message]:
        done = False
        while waiting and not done:
            if (first := self._next(waiting)) > deadline:
                self.clock.seconds = deadline
                return
            self.clock.seconds = max(self.clock.seconds, first)
            now = [message_id for message_id in waiting if self._due.get(message_id, 0.0) <= first]
            waiting = [message_id for message_id in waiting if message_id not in set(now)]
            for reply in self._all_of(now):
                yield reply
                # As on a network, what arrives at the same time is there together.
                done = (enough is not None and enough(reply)) or done

    def arrivals(self, message_ids: Sequence[str], timeout: float) -> list[Message]:
        """Return the replies that arrive next, all of the same instant; [] after `timeout` virtual seconds."""
        deadline = self.clock.now() + timeout
        if (first := self._next(message_ids)) > deadline:
            self.clock.seconds = deadline
            return []
        self.clock.seconds = max(self.clock.seconds, first)
        found = self._all_of([message_id for message_id in message_ids if self._due.get(message_id, 0.0) <= first])
        if not found:  # nodes that never answer: time passes all the same
            self.clock.seconds = deadline
        return found

    def _next(self, message_ids: Sequence[str]) -> float:
        return min((self._due.get(message_id, 0.0) for message_id in message_ids), default=math.inf)

    def _all_of(self, message_ids: Sequence[str]) -> list[Message]:
        """Return the replies to these messages, in their order, however long they take to be computed here."""
        found: dict[str, Message] = {}
        wait = getattr(self.inner, "arrivals", None)
        missing = list(message_ids)
        while missing:
            new = wait(missing, 60.0) if wait else list(self.inner.pull_messages(missing))
            found.update({reply.metadata.reply_to_message_id: reply for reply in new})
            if not new and not wait:
                break  # a node in this process that did not answer never will
            missing = [message_id for message_id in missing if message_id not in found]
        for message_id in message_ids:
            self._due.pop(message_id, None)
        return [found[message_id] for message_id in message_ids if message_id in found]

    def set_run(self, run: Any) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Any:
        return self.inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)


def _tasks(message: Message) -> int:
    """Return how many training tasks a message asks for; 0 for messages that take no time."""
    request = message.content.get("request")
    if message.metadata.message_type != TRAIN or not isinstance(request, ConfigRecord):
        return 0
    tasks = request.get("task-ids")
    return len(tasks) if isinstance(tasks, list) else 0
