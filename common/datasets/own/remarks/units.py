"""Columns that are empty in some tasks, and columns that some tasks give in another unit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

import numpy as np

from quickbloom.common.datasets.own.columns import TEXT, categories, usable
from quickbloom.common.datasets.own.remarks.grouped import Grouped
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.formatting import counted

if TYPE_CHECKING:
    from quickbloom.common.datasets.own.dataset import Own

_BY_CHANCE = 0.01
"""Chance that all cells of a task are empty, at the rate of the other tasks, below which it is remarked on."""
_LEAST = 5
"""Fewest numbers of a task for a statement on its unit."""
_FACTORS = {
    2.2046: "as pounds are to kilograms",
    2.54: "as centimetres are to inches",
    10.0: "",
    12.0: "as months are to years",
    18.016: "as mg/dl are to mmol/l of glucose",
    38.67: "as mg/dl are to mmol/l of cholesterol",
    60.0: "as minutes are to hours",
    88.42: "as µmol/l are to mg/dl of creatinine",
    100.0: "",
    365.25: "as days are to years",
    1000.0: "",
}
"""Factors between units, and the units."""
_ALIKE = log(1.25)
"""Difference of logarithms up to which tasks have the same unit."""
_SLACK = log(1.05)
"""The same for a factor and a known one, where all others agree."""
_ENOUGH = 3
"""Tasks of one unit whose means show how far means differ; of fewer, only a known factor says that a unit moved."""
_FAR, _FAR_OF_MANY = {3: 16.3, 4: 8.3, 5: 6.1, 6: 5.2}, 4.5
"""Deviations of the others' means, by their number, beyond which one more mean lies in 1 of 200 cases (Student's t)."""
_FROM, _ANY = 1.7, 5.0
"""Smallest factor that is looked at, and smallest one that need not be a known one."""


def remarks(data: Own, grouped: Grouped) -> Iterator[str]:
    """Yield remarks on columns in which tasks differ as they should not."""
    if len(grouped.names) < 2:
        return
    for name, kind in data.schema.features.items():
        if kind == TEXT:
            cells = categories(usable(data.table, name)).codes[grouped.rows] >= 0
            yield from _empty_somewhere(name, cells, grouped)
    for name, (_, column) in grouped.columns.items():
        yield from _empty_somewhere(name, ~np.isnan(column), grouped)
    for name, column in grouped.numbers():
        if name != data.options.time_column:
            yield from _moved(name, column, grouped)


def _empty_somewhere(name: str, known: Array, grouped: Grouped) -> Iterator[str]:
    if known.all():
        return
    held = grouped.sums(known.astype(np.float64))
    elsewhere = held > 0
    if not elsewhere.any() or elsewhere.all():
        return
    missing = 1 - held[elsewhere].sum() / grouped.sizes[elsewhere].sum()
    empty = np.flatnonzero(~elsewhere & (missing**grouped.sizes < _BY_CHANCE))
    if len(empty):
        yield (
            f"the column `{name}` is empty in {len(empty)} of {counted(len(held), 'task')} ({grouped.named(empty)}) and not in "
            "the others, which learn from what is missing there: fill it in, or leave it out with `own.features`"
        )


@dataclass(frozen=True)
class _Level:
    """A column's numbers by task, of the tasks that have enough of them: float64 [tasks] each."""

    tasks: Array
    mean: Array
    deviation: Array
    least: Array
    most: Array

    @classmethod
    def of(cls, column: Array, grouped: Grouped) -> _Level | None:
        """Return them; None if no task's mean stands out."""
        known = ~np.isnan(column)
        values = np.where(known, column, 0.0)
        held = grouped.sums(known.astype(np.float64))
        mean = grouped.sums(values) / np.maximum(held, 1)
        kept = np.flatnonzero(held >= _LEAST)
        if not _stands_out(mean[kept]):
            return None
        square = grouped.sums(np.where(known, values - mean[grouped.place], 0.0) ** 2)
        least, most = (function.reduceat(column, grouped.starts) for function in (np.fmin, np.fmax))
        deviation = np.sqrt(square / np.maximum(held, 1))
        return cls(kept, mean[kept], deviation[kept], least[kept], most[kept])


def _stands_out(mean: Array) -> bool:
    """Return whether there are means, all positive, of which some but not most lie far from the median."""
    if len(mean) < 2 or mean.min() <= 0:
        return False
    size = np.log(mean)
    if len(mean) == 2:
        return bool(np.ptp(size) > log(_ANY))
    far = int((np.abs(size - np.median(size)) > log(_FROM)).sum())
    return 0 < far <= len(mean) / 2


def _moved(name: str, column: Array, grouped: Grouped) -> Iterator[str]:
    """Yield a remark on every group of tasks whose numbers lie by one factor off those of all others.

    There is none unless no number overlaps, the others agree among themselves far better than that, and the spread differs like
    the mean: people differ from place to place in their mean, and units in both.
    """
    level = _Level.of(column, grouped)
    if level is None or level.least.min() < 0:
        return
    size = np.log(level.mean)
    suspects = np.flatnonzero(np.abs(size - np.median(size)) > log(_FROM))
    told = np.zeros(len(size), dtype=bool)
    for task in suspects if len(size) > 2 else [int(size.argmax())]:
        cluster = np.abs(size - size[task]) <= _ALIKE
        if told[task] or not (words := _factor(level, size, cluster)):
            continue
        told |= cluster
        yield (
            f"the column `{name}` of {grouped.named(level.tasks[cluster])} is {words}, without any overlap: if that is another "
            "unit, give all tasks the same one"
        )


def _factor(level: _Level, size: Array, cluster: Array) -> str:
    """Return how the tasks of `cluster` relate to all others, or "" if that may be chance."""
    others = ~cluster
    if others.sum() < cluster.sum():
        return ""
    apart = level.least[cluster].min() > level.most[others].max() or level.most[cluster].max() < level.least[others].min()
    away = float(np.median(size[cluster]) - np.median(size[others]))
    number = int(others.sum())
    if not apart or np.ptp(size[others]) > abs(away) / 2:
        return ""
    if number >= _ENOUGH and abs(away) < _FAR.get(number, _FAR_OF_MANY) * size[others].std(ddof=1):
        return ""
    spreads = [float(np.median(level.deviation[part])) for part in (cluster, others)]
    if min(spreads) <= 0:
        return ""
    spread = log(spreads[0] / spreads[1])
    if number >= _ENOUGH and _is_fahrenheit(level, cluster, spread):
        return "1.8 times that of the others and 32 more, as degrees Fahrenheit are to Celsius"
    if abs(spread - away) > log(3):
        return ""
    factor = float(np.exp(abs(away)))
    slack = min(max(_SLACK, 1.5 * float(np.ptp(size[others]))), _ALIKE if number >= _ENOUGH else 2 * _SLACK)
    known = min(_FACTORS, key=lambda one: abs(log(one) - abs(away)))
    fits = abs(log(known) - abs(away)) <= slack
    small, few = factor < _ANY, number < _ENOUGH
    if (small and few) or ((small or few) and not fits):
        return ""
    said = f"about {factor:.3g} times" if away > 0 else f"about 1/{factor:.3g} of"
    like = f" ({known:g} would be {_FACTORS[known]})" if fits and _FACTORS[known] else f" ({known:g}?)" if fits else ""
    return f"{said} that of the others{like}"


def _is_fahrenheit(level: _Level, cluster: Array, spread: float) -> bool:
    """Return whether a mean in Fahrenheit would lie among those of the others in Celsius, with a spread that fits."""
    celsius, there = (level.mean[cluster] - 32) / 1.8, level.mean[~cluster]
    room = float(np.median(level.deviation[~cluster]))
    inside = (celsius > there.min() - room) & (celsius < there.max() + room)
    return bool(inside.all()) and abs(spread - log(1.8)) < log(1.5)
