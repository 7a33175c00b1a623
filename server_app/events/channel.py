"""From whoever knows of an event to whoever wants to know of it.

A run has one `Events`, which is handed down to all that have something to tell. Listeners get the objects themselves. Only
Flower's log reaches a user whose SuperLink is on another machine: there an event is one line with a mark in front.
"""

import logging
import re
from collections.abc import Callable
from logging import INFO, WARNING

from quickbloom.common.flower.names import log
from quickbloom.common.printable import one_line
from quickbloom.server_app.events.kinds import Event, Failed, Saved, Stopped, Warned, from_line, to_line

Listener = Callable[[Event], None]
Warn = Callable[[str], None]
"""Takes one sentence that a person should know."""

_MARK = "quickbloom-event "
# Lines of the server's own begin so, and no word of a node stands at the beginning of one.
_LINE = re.compile(rf"INFO\s*:\s*{_MARK}(\{{.*\}})\s*")
_TOLD = "quickbloom_told"
"""Attribute of the log's records that say again what an event says."""


class Events:
    """Hands every event of a run to all `listeners`, and what a person should know to Flower's log as well.

    `round`: the round that goes on, 0 before the first; it is written on warnings and failures. A warning is told once.
    """

    def __init__(self, *listeners: Listener) -> None:
        self.round = 0
        self._listeners = [to_log, *listeners]
        self._early: list[Event] = []
        self._warned: set[str] = set()
        self._over = False

    def tell(self, event: Event) -> None:
        """Something has happened."""
        for listener in self._listeners:
            listener(event)
        if not self.round:
            self._early.append(event)

    def warn(self, sentence: str) -> None:
        """Tell a person something; the second time that it is said it is passed over."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            self.tell(Warned(one_line(sentence), self.round))

    def fail(self, who: str, reason: str) -> None:
        """An answer of this round is of no use, or did not come."""
        self.tell(Failed(who, reason, self.round))

    def stop(self, reason: str) -> None:
        """The run cannot go on; nothing more happens after the first call."""
        if not self._over:
            self._over = True
            self.tell(Stopped(one_line(reason)))

    def join(self, listener: Listener) -> None:
        """From now on `listener` gets what happens, after all that has happened before the first round."""
        for event in self._early:
            listener(event)
        self._listeners.append(listener)


def to_log(event: Event) -> None:
    """Say in Flower's log what a person should know."""
    if isinstance(event, Warned | Failed):
        log(WARNING, "%s", event.sentence, extra={_TOLD: True})


def warn_in_log(sentence: str) -> None:
    """Tell a person something where there is no run."""
    to_log(Warned(sentence))


def is_told(record: logging.LogRecord) -> bool:
    """Whether this record of the log says what an event says as well."""
    return hasattr(record, _TOLD)


def into_log(event: Event) -> None:
    """Write an event into Flower's log for `from_log`, but for what is of use on the server's machine alone."""
    if not isinstance(event, Saved):
        log(INFO, "%s%s", _MARK, to_line(event), extra={_TOLD: True})


def from_log(line: str) -> Event | None:
    """The event in a line of Flower's log, without colours; None if the line holds none."""
    found = _LINE.fullmatch(line.strip())
    return from_line(found[1]) if found else None
