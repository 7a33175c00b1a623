"""Columns that say the target in other words, and columns that only number the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from quickbloom.common.datasets.own.remarks.grouped import Grouped, words_of
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.formatting import counted

if TYPE_CHECKING:
    from quickbloom.common.datasets.own.dataset import Own

_TOO_CLOSE = 0.9
"""Correlation with the target above which a column is remarked on."""
_LEAST = 20
"""Fewest rows for a statement."""
_ENOUGH = 20_000
"""Rows that a correlation is taken of."""
_BY_CHANCE = 3.0
"""Expected pairs of equal numbers, if all were drawn from their range, above which it is no chance that none are equal."""
_IDS = frozenset({"id", "ids", "nr", "no", "number", "code", "key", "mrn", "uid", "uuid", "guid", "identifier", "record"})
_TIMES = frozenset({"time", "date", "day", "week", "month", "year", "timestamp"})


def remarks(data: Own, grouped: Grouped, known: str = "") -> Iterator[str]:
    """Yield remarks on columns of numbers. `known`: a column that the target's order in time was remarked on for."""
    sample = grouped.thinned(_ENOUGH)
    y = data.target.values[sample.rows]
    closeness = _OfClasses(y, sample) if data.kind == "classification" else _OfNumbers(y, sample)
    for name, column in grouped.numbers():
        if name == data.options.time_column:
            continue
        if _is_identifier(name, column):
            yield (
                f"all {counted(len(column), 'value')} of the whole-number column `{name}` differ, as ids do, which say nothing "
                f"of new rows: leave it out with `own.features`, or if it is the order of the rows, use `--time {name}`"
            )
        elif name != known and (found := _most(closeness, sample.columns[name][1], len(sample.names))):
            size, where = found
            yield (
                f"the column `{name}` has a correlation of {size:.2f} with the target{where}: if it is known only together "
                "with the target, or says the same in other words, leave it out with `own.features`"
            )


class _Closeness(Protocol):
    """How close a column is to the target, as a correlation in 0..1; 0 where too few rows, or no spread, say nothing."""

    def __call__(self, column: Array, there: Array | None, *, within: bool) -> float:
        """Return it for a column [n]. `there`: bool [n], rows that count; None: all. `within`: around the means of tasks."""


def _most(closeness: _Closeness, column: Array, tasks: int) -> tuple[float, str] | None:
    """Return the correlation of a column with the target, of all rows or within tasks, and which; None: it is unremarkable."""
    missing = np.isnan(column)
    there = ~missing if missing.any() else None
    found = [(closeness(column, there, within=False), "")]
    if tasks > 1:
        found.append((closeness(column, there, within=True), " within tasks"))
    best = max(found, key=lambda one: one[0])
    return best if best[0] > _TOO_CLOSE else None


class _OfNumbers:
    """The absolute correlation with a number."""

    def __init__(self, y: Array, grouped: Grouped) -> None:
        self._y, self._grouped = y, grouped
        self._around = {False: y - y.mean(), True: grouped.around_means(y)}

    def __call__(self, column: Array, there: Array | None, *, within: bool) -> float:
        if there is None:
            free = len(column) - (len(self._grouped.names) if within else 1)
            x, y = self._grouped.around_means(column) if within else column - column.mean(), self._around[within]
        else:
            column, y, place = column[there], self._y[there], self._grouped.place[there] * within
            held = np.bincount(place)
            free = len(column) - int((held > 0).sum())
            x, y = (numbers - (np.bincount(place, numbers) / np.maximum(held, 1))[place] for numbers in (column, y))
        if free < _LEAST - 1 or not _varies(x, column):
            return 0.0
        spread = float(np.sqrt((x @ x) * (y @ y)))
        return abs(float(x @ y)) / spread if spread > 0 else 0.0


class _OfClasses:
    """The root of the share of a column's variance that lies between classes, corrected for the number of these.

    That is epsilon squared (Kelley, "An Unbiased Correlation Ratio Measure", 1935); of two classes without the correction it is
    the squared correlation with either.
    """

    def __init__(self, y: Array, grouped: Grouped) -> None:
        self._place = grouped.place
        self._cells = {
            within: np.unique(grouped.place * (within * (y.max() + 1)) + y.astype(np.int64), return_inverse=True)[1].reshape(-1)
            for within in (False, True)
        }

    def __call__(self, column: Array, there: Array | None, *, within: bool) -> float:
        cells, place = self._cells[within], self._place * within
        if there is not None:
            column, cells, place = column[there], cells[there], place[there]
        rest, free = _around_means(column, cells)
        total, of_all = _around_means(column, place)
        if free < _LEAST - 1 or not _varies(np.sqrt(total / len(column)), column):
            return 0.0
        return float(np.sqrt(max(0.0, 1 - (rest / free) / (total / of_all))))


def _around_means(column: Array, at: Array) -> tuple[float, int]:
    """Return the sum of squares around the means of groups, and its degrees of freedom."""
    held = np.bincount(at)
    means = np.bincount(at, weights=column) / np.maximum(held, 1)
    return float(np.square(column - means[at]).sum()), len(column) - int((held > 0).sum())


def _varies(deviations: Array | np.floating, column: Array) -> bool:
    """Return whether there are deviations that are more than rounding."""
    return bool(len(column) and np.abs(deviations).max() > 1e-9 * np.abs(column).max())


def _is_identifier(name: str, column: Array) -> bool:
    """Return whether whole numbers are all different, and that not by chance, or in a column that is called like an id."""
    number = len(column)
    if number < _LEAST or np.isnan(column).any():
        return False
    span = float(column.max() - column.min()) + 1
    if span < number or (column != np.round(column)).any():
        return False
    words = words_of(name)
    if not _TIMES.isdisjoint(words):
        return False
    suspected = number * number / (2 * span) > _BY_CHANCE or not _IDS.isdisjoint(words) or name.endswith("#")
    return suspected and len(np.unique(column)) == number
