"""The order of a task's rows in time: parts and folds that are tested on what comes after, never on what lies between.

Rows of one moment stay together, so each part ends between two moments, and at that end which is nearest
to what was asked for.
"""

import numpy as np

from quickbloom.common.datasets.own.text import Array


def cut(moments: Array, *wanted: int) -> list[Array]:
    """Return the positions of consecutive parts in the order of their moments: one more than there are ends in `wanted`.

    `moments`: float64 [rows], none missing. `wanted`: the rows, ascending, at which parts should end. An
    empty list if there are fewer moments than parts. Each part has at least one moment.
    """
    order, ends = _in_order(moments)
    if len(ends) < len(wanted):
        return []
    chosen: list[int] = []
    for place, end in enumerate(wanted):
        first = 1 + int(np.searchsorted(ends, chosen[-1])) if chosen else 0
        free = ends[first : len(ends) - (len(wanted) - 1 - place)]
        chosen.append(int(free[np.abs(free - end).argmin()]))
    return np.split(order, chosen)


def first_of_each(moments: Array, strata: Array, shots: int) -> tuple[Array, Array]:
    """Return the positions of the first `shots` rows of each class (`strata`), and of all rows after the last of these.

    Each class has at least `shots` rows. What lies before that and is not among the first is in neither.
    """
    order, _ = _in_order(moments)
    chosen = np.concatenate([order[strata[order] == stratum][:shots] for stratum in np.unique(strata)])
    chosen = chosen[np.argsort(moments[chosen], kind="stable")]
    return chosen, order[moments[order] > moments[chosen[-1]]]


def folds(moments: Array, most: int) -> tuple[Array, int]:
    """Return the fold of every row for a validation forward in time, and the number of folds; 0: too few rows.

    Folds are contiguous. The rows before the first have the fold -1: they are adapted to, and never scored. Fold k
    is for a model of all rows before it, those of a lower number. Each has at least two rows, and there are at
    least two.
    """
    result = np.full(len(moments), -1, dtype=np.int64)
    for number in range(min(most, len(moments) // 2 - 1), 1, -1):
        parts = cut(moments, *(round(len(moments) * one / (number + 1)) for one in range(1, number + 1)))
        if parts and min(map(len, parts)) > 1:
            for place, part in enumerate(parts):
                result[part] = place - 1
            return result, number
    return result, 0


def is_before(first: Array, second: Array) -> bool:
    """Return whether all moments of `first` lie before all of `second`."""
    return not len(first) or not len(second) or bool(first.max() < second.min())


def _in_order(moments: Array) -> tuple[Array, Array]:
    """Return the positions by their moments, and the numbers of rows after which a new moment begins."""
    order = np.argsort(moments, kind="stable")
    return order, np.flatnonzero(np.diff(moments[order])) + 1
