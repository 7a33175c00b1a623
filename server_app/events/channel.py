"""Delivers events from their sources to their receivers.

A run has one `Events`, which is passed to all sources. Listeners get the objects themselves. Only
Flower's log reaches a user whose SuperLink is on another machine: there an event is one line with a
mark in front.
"""

import logging
import re
from collections.abc import Callable
from logging import INFO, WARNING

from quickbloom.common.flower.names import log
from quickbloom.common.printable import one_line
from quickbloom.server_app.events.kinds import Event, Failed, Joined, Saved, Stopped, Warned, from_line, to_line

Listener = Callable[[Event], None]
Warn = Callable[[str], None]
"""Receives one sentence for a person."""

_MARK = "quickbloom-event "
# The server's own lines begin so, and text of a node never stands at the beginning of a line.
_LINE = re.compile(rf"INFO\s*:\s*{_MARK}(\{{.*\}})\s*")
_TOLD = "quickbloom_told"
"""Attribute of log records that repeat an event."""


class Events:
    """Hands every event of a run to all `listeners`, and the ones for a person also to Flower's log.

    `round`: the current round, 0 before the first; warnings and failures carry it. A warning is
    given once.
    """

    def __init__(self, *listeners: Listener) -> None:
        self.round = 0
        self._listeners = [to_log, *listeners]
        self._early: list[Event] = []
        self._warned: set[str] = set()
        self._over = False

    def tell(self, event: Event) -> None:
        """Report an event."""
        for listener in self._listeners:
            listener(event)
        if not self.round:
            self._early.append(event)

    def warn(self, sentence: str) -> None:
        """Warn a person; a repeated warning is ignored."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            self.tell(Warned(one_line(sentence), self.round))

    def fail(self, who: str, reason: str) -> None:
        """Report an answer of this round that is invalid or missing."""
        self.tell(Failed(who, reason, self.round))

    def stop(self, reason: str) -> None:
        """Report that the run cannot continue; nothing is reported after the first call."""
        if not self._over:
            self._over = True
            self.tell(Stopped(one_line(reason)))

    def join(self, listener: Listener) -> None:
        """Add `listener`, which first gets everything that happened before the first round."""
        for event in self._early:
            listener(event)
        self._listeners.append(listener)


def to_log(event: Event) -> None:
    """Write a sentence for a person into Flower's log."""
    if isinstance(event, Warned | Failed):
        log(WARNING, "%s", event.sentence, extra={_TOLD: True})
    elif isinstance(event, Joined):
        log(INFO, "%s", event.sentence, extra={_TOLD: True})


def warn_in_log(sentence: str) -> None:
    """Warn a person outside a run."""
    to_log(Warned(sentence))


def is_told(record: logging.LogRecord) -> bool:
    """Return whether this record of the log repeats an event."""
    return hasattr(record, _TOLD)


def into_log(event: Event) -> None:
    """Write an event into Flower's log for `from_log`, without what is useful only on the server's machine."""
    if not isinstance(event, Saved):
        log(INFO, "%s%s", _MARK, to_line(event), extra={_TOLD: True})


def from_log(line: str) -> Event | None:
    """Return the event in a line of Flower's log, without colours; None if the line holds none."""
    found = _LINE.fullmatch(line.strip())
    return from_line(found[1]) if found else None
