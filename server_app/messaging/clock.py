"""The time by which a run waits: that of the machine, or the virtual time of simulated devices."""

import time
from typing import Protocol

from flwr.serverapp import Grid


class Clock(Protocol):
    """A time in seconds, from any beginning. `virtual`: it passes only when somebody waits."""

    virtual: bool

    def now(self) -> float:
        """Return the time."""

    def sleep(self, seconds: float) -> None:
        """Wait so many seconds."""


class RealClock:
    """The time of this machine."""

    virtual = False

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


REAL = RealClock()


def clock_of(grid: Grid) -> Clock:
    """Return the clock of a grid: its own where it has one."""
    clock: Clock = getattr(grid, "clock", REAL)
    return clock
