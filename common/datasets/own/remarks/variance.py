"""How much of a target's variance lies between tasks, within them, and within them in order of time.

Components of variance are those of the one-way analysis of variance with random effects (Searle, Casella, McCulloch,
"Variance Components", 1992, section 3.6): with k tasks of n_i rows, N in all, and mean squares between tasks (MSB) and within
them (MSW),

    within = MSW,    between = (MSB - MSW) / n_0,    n_0 = (N - sum n_i^2 / N) / (k - 1),

which are unbiased for any n_i; a negative estimate is told as 0. Classes have the variance of their indicators, summed over
them: the Gini index, as in Light and Margolin, "An Analysis of Variance for Categorical Data" (JASA 1971).

What is not explained in order is the estimate of a residual variance by Gasser, Sroka, Jennen-Steinmetz, "Residual variance
and residual pattern in nonlinear regression" (Biometrika 1986): a row's deviation d from the straight line between its
neighbours in time, with weights a and b, has the variance s^2 (1 + a^2 + b^2) around a curve that is straight there, so the
mean of d^2 / (1 + a^2 + b^2) estimates s^2. Of n rows of one moment their mean is the neighbour, with a^2 / n for a^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quickbloom.common.datasets.own.remarks.grouped import Grouped
from quickbloom.common.datasets.own.text import Array

if TYPE_CHECKING:
    from quickbloom.common.datasets.own.dataset import Own

_LEAST_BETWEEN_NEIGHBOURS = 20
"""Fewest rows with a neighbour on each side for a statement on order."""
_MOST_CELLS = 20_000_000
"""Most rows times classes: what takes longer is not said."""


@dataclass(frozen=True)
class Components:
    """Variances between tasks and within them, in squares of the target's unit; of classes the Gini index."""

    between: float
    within: float

    @property
    def share_between(self) -> float:
        """The part of the variance that lies between tasks, in 0..1."""
        return self.between / (self.between + self.within)


def components(data: Own, grouped: Grouped) -> Components | None:
    """Return the components of the target's variance; None if no task has two rows, or nothing varies."""
    y = data.target.values[grouped.rows]
    squares = _of_classes if data.kind == "classification" else _of_numbers
    between, within = squares(y, grouped)
    n, k, sizes = len(grouped), len(grouped.names), grouped.sizes.astype(np.float64)
    if n == k or between + within <= 0:
        return None
    mean_within = within / (n - k)
    if k == 1:
        return Components(0.0, mean_within)
    typical = (n - (sizes**2).sum() / n) / (k - 1)
    return Components(max(0.0, (between / (k - 1) - mean_within) / typical), mean_within)


def _of_numbers(y: Array, grouped: Grouped) -> tuple[float, float]:
    """Return the sums of squares between and within tasks."""
    means = grouped.sums(y) / grouped.sizes
    return float((grouped.sizes * np.square(means - y.mean())).sum()), float(np.square(grouped.around_means(y)).sum())


def _of_classes(y: Array, grouped: Grouped) -> tuple[float, float]:
    """Return the same for indicators of classes: sum n_i (1 - sum p_ic^2) within tasks, and what is missing from all rows."""
    labels = y.astype(np.int64)
    cells, counts = np.unique(grouped.place * (labels.max() + 1) + labels, return_counts=True)
    within = len(y) - float((counts**2 / grouped.sizes[cells // (labels.max() + 1)]).sum())
    return len(y) - float((np.bincount(labels) ** 2 / len(y)).sum()) - within, within


def explained_in_order(data: Own, grouped: Grouped, moments: Array, within: float) -> float | None:
    """Return the share of the variance `within` tasks that a straight line between neighbours in time explains; at least 0.

    `moments`: float64 [n], of the rows of `grouped`. None: too few rows have neighbours on both sides.
    """
    known = ~np.isnan(moments)
    classes = len(data.classes) or 1
    line = _Line.between(grouped.place[known], moments[known])
    if line.rows < _LEAST_BETWEEN_NEIGHBOURS or classes * len(grouped) > _MOST_CELLS or within <= 0:
        return None
    y = data.target.values[grouped.rows][known]
    parts = ((y == label).astype(np.float64) for label in range(classes)) if data.kind == "classification" else (y,)
    return max(0.0, 1 - sum(map(line.residual, parts)) / within)


@dataclass(frozen=True)
class _Line:
    """Neighbours in time. Moments of one task stand together, in order: `moment` is the moment of each row in `order`.

    `inner`: positions in `order` of rows with a moment before and after theirs; `before`: weight of the earlier one.
    """

    order: Array
    moment: Array
    sizes: Array
    inner: Array
    before: Array

    @classmethod
    def between(cls, place: Array, moments: Array) -> _Line:
        order = np.lexsort((moments, place))
        place, moments = place[order], moments[order]
        new = np.append(True, (np.diff(place) != 0) | (np.diff(moments) > 0))[: len(order)]
        moment = np.cumsum(new) - 1
        at = np.flatnonzero(new)
        task, when = place[at], moments[at]
        has_both = np.zeros(len(at), dtype=bool)
        has_both[1:-1] = (task[:-2] == task[1:-1]) & (task[1:-1] == task[2:])
        middle = np.flatnonzero(has_both)
        weight = np.zeros(len(at))
        weight[middle] = (when[middle + 1] - when[middle]) / (when[middle + 1] - when[middle - 1])
        inner = np.flatnonzero(has_both[moment]) if len(order) else order
        return cls(order, moment, np.bincount(moment), inner, weight)

    @property
    def rows(self) -> int:
        """The number of rows with neighbours on both sides."""
        return len(self.inner)

    def residual(self, y: Array) -> float:
        """Return the estimate of the variance around the curve."""
        y = y[self.order]
        means = np.bincount(self.moment, weights=y) / self.sizes
        at, before = self.moment[self.inner], self.before[self.moment[self.inner]]
        distance = y[self.inner] - before * means[at - 1] - (1 - before) * means[at + 1]
        spread = 1 + before**2 / self.sizes[at - 1] + (1 - before) ** 2 / self.sizes[at + 1]
        return float((distance**2 / spread).mean())
