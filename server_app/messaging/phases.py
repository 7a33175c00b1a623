"""Seconds of a round by what the server does: it is in one phase at a time, so that the phases add up to the round."""

import time

ASKING, WAITING, AGGREGATING, SCORING = "asking", "waiting", "aggregating", "scoring"
PHASES = (ASKING, WAITING, AGGREGATING, SCORING)


class Phases:
    """The phases of one round, which begins now and with `ASKING`."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase = ASKING
        self._begun = self._since = time.monotonic()

    def enter(self, phase: str) -> None:
        """Begin a phase of `PHASES`, which ends the one before. It costs less than a microsecond: replies may be many."""
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def read(self) -> tuple[float, dict[str, float]]:
        """Return the seconds since the round began, and those of each phase, in tenths of a millisecond."""
        self.enter(self._phase)
        return round(self._since - self._begun, 4), {phase: round(seconds, 4) for phase, seconds in self._seconds.items()}
