"""Quiet hours: a window of the day, in local time, in which this device takes no part."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from os import getpid, kill
from signal import SIGTERM
from threading import Event, Thread

from quickbloom.common.errors import ConfigError

_DAY = 24 * 60
_LOOK = 20.0
"""Seconds between two looks at the clock, which may be set or suspended in between."""


@dataclass(frozen=True)
class QuietHours:
    """A window from `start` to `end`, in minutes after midnight; it may span midnight. Equal values mean never."""

    start: int = 0
    end: int = 0

    @classmethod
    def parse(cls, text: str) -> "QuietHours":
        """Return the hours of "22:30-06:00"; "" means never. Raises ConfigError."""
        if not text:
            return cls()
        found = re.fullmatch(r"(\d\d?):(\d\d)-(\d\d?):(\d\d)", text.strip())
        hours = [int(part) for part in found.groups()] if found else [99]
        minutes = [60 * hour + minute for hour, minute in zip(hours[::2], hours[1::2], strict=False)]
        if max(hours[1::2], default=99) > 59 or max(minutes) > _DAY or abs(minutes[0] - minutes[1]) == _DAY:
            raise ConfigError(f"`--quiet-hours` must be HH:MM-HH:MM, less than a whole day, such as 22:30-06:00, got '{text}'")
        return cls(minutes[0] % _DAY, minutes[1] % _DAY)

    def now(self, at: datetime) -> bool:
        """Return whether the time of day of `at` is within the quiet hours."""
        minute = 60 * at.hour + at.minute
        if self.start <= self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end

    def __str__(self) -> str:
        return "-".join(f"{minute // 60:02}:{minute % 60:02}" for minute in (self.start, self.end))


def outside(
    quiet: QuietHours,
    work: Callable[[], int],
    say: Callable[[str], None],
    clock: Callable[[], datetime] = datetime.now,
    look: float = _LOOK,
) -> int:
    """Run `work` outside the quiet hours; return its result when it ends by itself.

    When the quiet hours begin, this process gets SIGTERM, and `work` must then return or raise
    KeyboardInterrupt.
    """
    while True:
        if quiet.now(clock()):
            say(f"quiet hours {quiet}: taking no part until they end")
            while quiet.now(clock()):
                time.sleep(look)
        done, began = Event(), Event()

        def watch(done: Event = done, began: Event = began) -> None:
            while not done.wait(look):
                if quiet.now(clock()) and not done.is_set():
                    began.set()
                    kill(getpid(), SIGTERM)
                    return

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        try:
            code = work()
        except KeyboardInterrupt:
            if not began.is_set():
                raise
            code = 0
        finally:
            done.set()
            watcher.join()
        if not began.is_set():
            return code
