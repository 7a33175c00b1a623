"""Means and deviations of columns over many nodes, from each node's own: nobody sends a row."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quickbloom.common.datasets.own.text import Array

TARGET = ""
"""Name of the target among columns: on each node its own may differ, and no column is called so."""
LEAST_SPREAD = 1e-9
"""Share of the largest number of a column below which a deviation is only rounding."""
NOTHING_KNOWN = 1e300
"""Deviation of a column without a number: whatever comes becomes 0."""


@dataclass(frozen=True)
class Moments:
    """What some numbers show. `count`: of those that are known; `squares`: sum of squared differences from their `mean`."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, column: Array) -> "Moments":
        """Return the moments of a column [rows]; NaN is missing."""
        known = column[~np.isnan(column)]
        if not len(known):
            return cls()
        mean = float(known.mean())
        return cls(len(known), mean, float(np.square(known - mean).sum()))

    def scale(self, without_spread: float = 1.0) -> list[float]:
        """Return [mean, deviation]. Numbers that differ by rounding alone have the deviation `without_spread`."""
        if not self.count:
            return [0.0, NOTHING_KNOWN]
        deviation = math.sqrt(self.squares / self.count)
        return [self.mean, deviation if deviation > LEAST_SPREAD * abs(self.mean) else without_spread]


def joined(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all the numbers together (Chan, Golub, LeVeque 1983, "Algorithms for .. the Sample Variance").

    Means and differences from them, not plain sums: a column of dates would lose its digits in squares of large numbers.
    """
    count = sum(part.count for part in parts)
    if not count:
        return Moments()
    mean = math.fsum(part.count * part.mean for part in parts) / count
    squares = math.fsum(part.squares + part.count * (part.mean - mean) ** 2 for part in parts)
    return Moments(count, mean, squares)


def scales_from_json(text: str) -> tuple[dict[str, list[float]], list[float]]:
    """Return what `scales_to_json` was given. Raises ValueError or TypeError for any other text."""
    columns, target = json.loads(text)
    return dict(columns), list(target)


def scales_to_json(columns: Mapping[str, Sequence[float]], target: Sequence[float]) -> str:
    """Return ([mean, deviation] by column, the same of the target or []) as text; the inverse is `scales_from_json`."""
    return json.dumps([dict(columns), list(target)], sort_keys=True)


def scales_of(nodes: Sequence[Mapping[str, Moments]], target_deviation: float) -> tuple[dict[str, list[float]], list[float]]:
    """Return ([mean, deviation] by column, the same of the target or []) of all nodes together."""
    names = sorted({name for node in nodes for name in node})
    found = {name: joined([node[name] for node in nodes if name in node]) for name in names}
    columns = {name: moments.scale() for name, moments in found.items() if name != TARGET}
    return columns, found[TARGET].scale(target_deviation) if TARGET in found else []
