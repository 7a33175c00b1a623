"""A Grid that waits for replies with short polls.

Flower's own grids sleep 0.1 s (simulation) or 3 s (deployment) between two looks, which is most of
a small round. This one waits for a fraction of the elapsed time, so it costs little both for rounds
of 50 ms and for rounds of minutes. Rounds take about as long as the one before: until replies are
due it looks every half second at most, then often. In a simulation it is notified of every reply;
without that a round of 0.3 s takes a twentieth longer.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from quickbloom.common.config.run import Scalar
from quickbloom.common.flower import names, registry
from quickbloom.common.flower.simulation import telling
from quickbloom.common.flower.upload_deadline import GRACE, awaited_until, limit_uploads
from quickbloom.common.wire import packing
from quickbloom.common.wire.messages import WireError, payload_bytes, tell_settings
from quickbloom.common.wire.roll_call import ROLL_CALL

_SHORTEST, _LONGEST = 0.004, 0.5  # seconds
_DUE = 0.85
"""Fraction of the last wait for replies after which they are due."""
_SHRINKS = 0.7
"""Discount on the measured wait when the first look finds every reply: they arrived before it."""
_AT_ONCE = 16
"""Messages that are pushed together to a SuperLink: it has them all before the first part of any of them."""
_PUSHES = 3
"""Attempts to upload messages whose parts are refused; each is a session of its own for the SuperLink."""
LARGE = 2**23
"""Bytes from which a reply, assumed as large as its request, is handled before the next one is fetched."""


@runtime_checkable
class GridWithReplies(Protocol):
    """A grid that hands replies on as they arrive."""

    def replies(
        self, messages: Iterable[Message], timeout: float | None = None, enough: Callable[[Message], bool] | None = None
    ) -> Iterator[Message]:
        """Send, then yield every reply that arrives in time, until `enough` of one of them is True."""

    def arrivals(self, message_ids: Sequence[str], timeout: float) -> list[Message]:
        """Return replies to messages that were pushed before, as soon as there is one; [] after `timeout` seconds."""


def arrivals(grid: Grid, message_ids: Sequence[str], timeout: float) -> list[Message]:
    """As `GridWithReplies.arrivals`, for any grid."""
    if isinstance(grid, GridWithReplies):
        return grid.arrivals(message_ids, timeout)
    deadline = time.monotonic() + timeout
    while not (found := list(grid.pull_messages(message_ids))) and time.monotonic() < deadline:
        time.sleep(min(_SHORTEST, timeout))
    return found


class PollingGrid(Grid):
    """Delegates everything to another grid but the waiting in `send_and_receive`.

    `settings`: those of the run that its nodes cannot know from Flower; every message carries them.
    `packs`: whether the records of a small message travel as one, which only the ClientApp of this
    package can read.
    """

    def __init__(self, grid: Grid, settings: Mapping[str, Scalar] | None = None, *, packs: bool = False) -> None:
        limit_uploads(grid)
        self._grid = grid
        self.stays_here = hands_over(grid)
        self._settings = dict(settings or {})
        self._packs = packs
        self._stored = told_of_replies(grid)
        self._large = False
        self._took: dict[str, float] = {}
        """Seconds until all, or enough, replies to the last messages of a type had arrived."""
        self._look = float("inf")
        """Least seconds of a look that finds nothing: a SuperLink costs far more to ask than memory."""

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages through the other grid. Afterwards they hold the contents that were sent."""
        listed = list(messages)
        if listed:
            self._large = self._large or are_large(listed)
        for message in listed:
            if not packing.is_packed(message.content):
                tell_settings(message.content, self._settings)
            # A node of another release must be able to read the roll call, and to report its release.
            if self._packs and message.metadata.message_type != ROLL_CALL:
                message.content = packing.pack(message.content)
        return self._pushed(listed)

    def _pushed(self, messages: list[Message]) -> list[str]:
        """Push through the other grid, to many nodes a few messages at a time.

        A node finds its message as soon as that is there, and asks again and again for parts that are still to come.
        """
        size = max(1, len(messages)) if self.stays_here else _AT_ONCE
        ids: list[str] = []
        for group in (messages[i : i + size] for i in range(0, len(messages), size)):
            found = list(self._pushed_at_once(group))
            ids += found if len(found) == len(group) else [""] * len(group)  # Flower returns none of a group that is too large
        return ids

    def _pushed_at_once(self, messages: list[Message]) -> Iterable[str]:
        """Push through the other grid, again where the SuperLink was away for longer than it waits for all parts."""
        refused: Any = names.find("ObjectPushError") or ()
        for _ in range(_PUSHES - 1):
            with suppress(refused):
                return self._grid.push_messages(messages)
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            if self._packs and reply.has_content():
                with suppress(WireError):  # its reader finds the content missing
                    reply.content = packing.unpack(reply.content)
        return replies

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
    ) -> list[Message]:
        """Send, then return the replies that arrive within `timeout` seconds (None: all replies, however long it takes)."""
        return list(self.replies(messages, timeout))

    def replies(
        self, messages: Iterable[Message], timeout: float | None = None, enough: Callable[[Message], bool] | None = None
    ) -> Iterator[Message]:
        """Send, then yield every reply as it arrives. Neither replies nor messages are kept here.

        `enough` gets every reply. Once it returns True, only the replies of the same look are still
        yielded. Without it, large replies come in the order of their requests; Flower keeps the
        others meanwhile.
        """
        listed = list(messages)
        large = are_large(listed)
        started = time.monotonic()
        # None stands for a message that could not be delivered and has no reply.
        waiting = [message_id for message_id in self.push_messages(listed) if message_id]
        kind = listed[0].metadata.message_type if listed else ""
        return self._wait(waiting, kind, started, timeout, enough, large=large)

    def arrivals(self, message_ids: Sequence[str], timeout: float) -> list[Message]:
        """Return replies to messages that were pushed before, as soon as there is one; [] after `timeout` seconds.

        Large replies are returned one by one.
        """
        started = time.monotonic()
        while True:
            looked = time.monotonic()
            with awaited_until(looked + GRACE):
                found = self._first(message_ids) if self._large else self.pull_messages(message_ids)
            now = time.monotonic()
            if found or now - started >= timeout:
                return found
            wait = max(_SHORTEST, min((now - started) / 10, 4 * (now - looked), _LONGEST))
            self._rest(max(0.0, min(wait, timeout - (now - started))), now - looked)

    def _first(self, message_ids: Sequence[str]) -> list[Message]:
        return next((found for one in message_ids if (found := self.pull_messages([one]))), [])

    def _wait(
        self,
        waiting: list[str],
        kind: str,
        started: float,
        timeout: float | None,
        enough: Callable[[Message], bool] | None,
        *,
        large: bool,
    ) -> Iterator[Message]:
        # Flower fetches everything that it is asked for before it returns: one large reply is enough in memory.
        at_once = 1 if large else len(waiting)
        in_order, done, over = large and enough is None, False, False
        # From now: a SuperLink that was away while the messages were sent has taken no time of the nodes'.
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        looks = 0
        while waiting and not (done or over):
            over = time.monotonic() >= deadline
            there = set[str]()
            looked, took = time.monotonic(), 0.0
            looks += 1
            for i in range(0, len(waiting), at_once):
                # Once there are enough, an incomplete reply is not worth waiting for.
                with awaited_until(looked if done else max(deadline, looked + GRACE)):
                    asked = time.monotonic()
                    replies = self.pull_messages(waiting[i : i + at_once])
                    took += time.monotonic() - asked
                while replies:
                    reply = replies.pop(0)
                    there.add(reply.metadata.reply_to_message_id)
                    done = (enough is not None and enough(reply)) or done
                    yield reply
                    del reply
                if in_order and not over and waiting[i] not in there:
                    break
            waiting = [message_id for message_id in waiting if message_id not in there]
            now = time.monotonic()
            if looked + took - max(deadline, looked) > 2 * GRACE:
                # Only a SuperLink that is away holds a look up for so long: this time is not the nodes'.
                deadline, over = deadline + took, False
            if not there:
                self._look = min(self._look, took)
            if done or not waiting:
                self._took[kind] = (looked - started) * (_SHRINKS if looks <= 2 else 1.0)
            elif not over:
                wait = pause(now - started, self._took.get(kind, math.inf), self._look)
                self._rest(max(0.0, min(wait, deadline - now)), took)

    def _rest(self, wait: float, look: float) -> None:
        """Wait so many seconds, or until a reply is notified. `look`: seconds that the last look took."""
        if self._stored is None:
            time.sleep(wait)
            return
        started = time.monotonic()
        if self._stored.wait(wait):
            self._stored.clear()
            # With many nodes replies arrive all the time: looks take a tenth of the time at most.
            time.sleep(max(0.0, min(wait, 9 * look) - (time.monotonic() - started)))


def told_of_replies(grid: Grid) -> threading.Event | None:
    """Return the event that is set when a reply has arrived, if messages stay in memory; None otherwise."""
    state: Any = getattr(grid, "state", None)
    store = getattr(state, "store_message_res", None)
    if not hands_over(grid) or not callable(store):
        return None
    if type(state).__module__.startswith("flwr.") and not registry.allowed("told-of-replies"):
        return None
    stored = threading.Event()
    state.store_message_res = telling(store, stored)
    return stored


def hands_over(grid: Grid) -> bool:
    """Return whether messages stay in the memory of one machine, as in a simulation, where packing would only cost time."""
    return type(grid).__name__ == "InMemoryGrid"  # by name, because the module of the class changes between releases of Flower


def pause(passed: float, due: float, look: float) -> float:
    """Return the seconds until the next look.

    `passed`: since the messages were sent; `due`: duration of the last wait; `look`: duration of a
    look, of which this makes a fifth of the time at most (inf: not known yet, for both).
    """
    if math.isinf(due) or passed > 1.5 * due:
        part = passed / 10
    elif passed < _DUE * due:
        part = _DUE * due - passed
    else:
        part = due / 50
    return min(max(part, _SHORTEST, 0.0 if math.isinf(look) else 4 * look), _LONGEST)


def are_large(messages: Iterable[Message]) -> bool:
    """Return whether the replies to these messages are assumed to be large, as their requests are."""
    return any(payload_bytes(message.content) >= LARGE for message in messages)
