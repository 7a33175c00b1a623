"""Simulated devices: how long each computes, and at which hours of the day it can.

The built-in "lognormal" fleet is made by us so as to have three published properties: device speeds spread over two orders
of magnitude (Huba et al. 2022, "PAPAYA", s. 2; here the slowest tenth is ten times slower than the median or more), devices
compute while they are idle and charging, mostly at night, so that about four times as many are there at the best hour as at
the worst (Bonawitz et al. 2019, "Towards Federated Learning at Scale", s. 9), and each is away for half of the day.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from quickbloom.common.errors import ConfigError
from quickbloom.common.randomness import generator

DAY = 24.0
SECONDS = 60.0
"""Seconds that the median device computes on one training task."""
_SPREAD = math.log(10) / NormalDist().inv_cdf(0.9)
"""Standard deviation of the logarithm of the seconds: the slowest tenth takes ten times as long as the median, or longer."""
_EVENING, _EVENING_SPREAD = 20.0, 4.3
_SHORTEST, _LONGEST = 8.0, 16.0
COLUMNS = ("seconds", "from", "until")


@dataclass(frozen=True)
class Device:
    """`seconds`: for one training task; `start` and `end`: the hours of the day (0..24) between which it is there.

    Equal hours: it is always there. `end` may be before `start`: then it is there over midnight.
    """

    seconds: float = SECONDS
    start: float = 0.0
    end: float = 0.0

    def is_there(self, now: float) -> bool:
        """Return whether the device is there `now`, in seconds since the midnight before the run."""
        return self._away(now) == 0

    def back(self, now: float) -> float:
        """Return when the device is there next, from `now` on."""
        return now + self._away(now)

    def finish(self, now: float, seconds: float) -> float:
        """Return when it has computed for `seconds`, from `now` on: it pauses while it is away, and goes on when it is back."""
        now += self._away(now)
        if seconds <= (there := self._left(now)):
            return now + seconds
        seconds -= there
        now += there
        now += self._away(now)
        # Whole days of work, each followed by a pause; what is left is done within the hours of the last day.
        days = max(0, math.ceil(seconds / max(1e-6, self._hours * 3600)) - 1)
        return now + days * DAY * 3600 + seconds - days * self._hours * 3600

    @property
    def _hours(self) -> float:
        return (self.end - self.start) % DAY or DAY

    def _since_start(self, now: float) -> float:
        """Hours since it was there for the first time of the last day."""
        return (now / 3600 - self.start) % DAY

    def _away(self, now: float) -> float:
        """Seconds until it is there; 0 if it is."""
        since = self._since_start(now)
        # An instant after its hours, and rounding, must not make a pause of no length.
        return 0.0 if self._hours == DAY or since < self._hours - 1e-9 else max(1e-6, (DAY - since) * 3600)

    def _left(self, now: float) -> float:
        return math.inf if self._hours == DAY else max(1e-6, (self._hours - self._since_start(now)) * 3600)


def devices_of(setting: str, seed: int, names: Mapping[int, str]) -> dict[int, Device]:
    """Return the device of every node for the setting `devices`. `names`: of the nodes, which the draws depend on.

    Raises ConfigError for a file that holds no devices.
    """
    if setting == "even":
        return dict.fromkeys(names, Device())
    if setting == "lognormal":
        return {node_id: lognormal(seed, name) for node_id, name in names.items()}
    known = read(Path(setting))
    ordered = sorted(names, key=lambda node_id: names[node_id])
    return {node_id: known[place % len(known)] for place, node_id in enumerate(ordered)}


def lognormal(seed: int, name: str) -> Device:
    """Return a device of the built-in fleet: a function of (seed, name)."""
    rng = generator(seed, "device", name)
    seconds = SECONDS * math.exp(_SPREAD * rng.standard_normal())
    start = (_EVENING + _EVENING_SPREAD * rng.standard_normal()) % DAY
    return Device(seconds, start, (start + rng.uniform(_SHORTEST, _LONGEST)) % DAY)


def read(path: Path) -> list[Device]:
    """Return the devices of a CSV file with the columns `seconds`, `from` and `until`. Raises ConfigError."""
    try:
        with path.expanduser().open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"`devices` must be even, lognormal or a CSV file that can be read, got {str(path)!r} ({error})"
        ) from None
    if not rows or any(column not in rows[0] for column in COLUMNS):
        raise ConfigError(
            f"the file of `devices` must have a first line with the columns {', '.join(COLUMNS)} and a line for each device, "
            f"and '{path.name}' does not"
        )
    return [_device(row, number + 2) for number, row in enumerate(rows)]


def _device(row: Mapping[str, str | None], line: int) -> Device:
    numbers = []
    for column, most in zip(COLUMNS, (1e9, DAY, DAY), strict=True):
        try:
            number = float(row[column] or "")
        except ValueError:
            number = math.nan
        if not 0 <= number <= most or (column == "seconds" and number == 0):
            raise ConfigError(
                f"line {line} of the file of `devices` must have a number in `{column}`"
                + (" above 0" if column == "seconds" else " from 0 to 24 (an hour)")
                + f", got {row[column]!r}"
            )
        numbers.append(number)
    return Device(numbers[0], numbers[1] % DAY, numbers[2] % DAY)
