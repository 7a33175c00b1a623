"""Columns that order the rows of a task in time, and targets that such an order gives away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from quickbloom.common.datasets.own.columns import NUMBER
from quickbloom.common.datasets.own.remarks.grouped import Grouped, words_of
from quickbloom.common.datasets.own.remarks.variance import Components, components, explained_in_order
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.formatting import counted

if TYPE_CHECKING:
    from quickbloom.common.datasets.own.dataset import Own

_WORDS = frozenset(
    {"time", "date", "day", "days", "week", "weeks", "month", "months", "year", "years", "hour", "hours", "minute", "minutes"}
    | {
        "second",
        "seconds",
        "timestamp",
        "moment",
        "visit",
        "step",
        "sequence",
        "seq",
        "order",
        "trial",
        "session",
        "cycle",
        "t",
    }
    | {"epoch", "index"}
)
_NEARLY_ALL, _OFTEN = 0.95, 0.5
"""Shares of the steps from row to row: those that go one way, and those that move at all."""
_LEAST_STEPS = 20
_GIVEN_AWAY, _NOTABLE = 0.9, 0.1
"""Shares of the variance within tasks that neighbours in time explain: for a remark, and to be told at all."""


def column_of_time(data: Own, grouped: Grouped, found: Components) -> tuple[str, float] | None:
    """Return the column that orders rows, and the share of the variance within tasks that its order explains.

    The column is the one of `--time`, else the one, among those that look like time, whose order explains most.
    """
    if data.times is not None:
        share = explained_in_order(data, grouped, data.times[grouped.rows], found.within)
        return None if share is None else (data.options.time_column, share)
    shares = {
        name: explained_in_order(data, grouped, column, found.within)
        for name, (kind, column) in grouped.columns.items()
        if _looks_like_time(name, kind, column, grouped)
    }
    known = {name: share for name, share in shares.items() if share is not None}
    if not known:
        return None
    best = max(known, key=lambda name: known[name])
    return best, known[best]


def _looks_like_time(name: str, kind: str, column: Array, grouped: Grouped) -> bool:
    """Return whether a column is of dates, is called like a time, or goes one way from row to row within the tasks."""
    if kind != NUMBER or not _WORDS.isdisjoint(words_of(name)):
        return True
    steps = np.diff(column)[np.diff(grouped.place) == 0]
    steps = steps[~np.isnan(steps)]
    up, down = int((steps > 0).sum()), int((steps < 0).sum())
    if len(steps) < _LEAST_STEPS or up + down < _OFTEN * len(steps):
        return False
    return len(steps) - min(up, down) >= _NEARLY_ALL * len(steps)


def remarks(data: Own, grouped: Grouped) -> tuple[str, list[str]]:
    """Return the column that gives the target away to shuffled rows, or "", and the remark on it."""
    found = components(data, grouped) if data.times is None else None
    best = column_of_time(data, grouped, found) if found else None
    if best is None or best[1] < _GIVEN_AWAY:
        return "", []
    name, share = best
    return name, [
        f"rows that are neighbours in `{name}` have nearly the same `{data.schema.target}` (interpolating explains {share:.0%} "
        f"of its variance within a task), so shuffled rows test how well gaps are filled: if `{name}` is a time, cut the rows "
        f"in its order with `--time {name}`".replace("%", " %")
    ]


def in_words(data: Own) -> Iterator[str]:
    """Yield one sentence on where the variance of the target lies; none if nothing varies."""
    grouped = Grouped.of(data)
    found = components(data, grouped)
    if found is None:
        return
    what = f"the variance{' (Gini)' if data.kind == 'classification' else ''} of `{data.schema.target}`"
    best, tasks = column_of_time(data, grouped, found), counted(len(grouped.names), "task")
    order = f"{best[1]:.0%} is explained by interpolating the neighbours in `{best[0]}`".replace("%", " %") if best else ""
    if best and data.times is None and best[1] < _NOTABLE:
        order = ""
    if len(grouped.names) == 1:
        if order:
            yield f"of {what} {order}"
        return
    between = round(100 * found.share_between)
    of_that = f"; of that within, {order}" if order else ""
    yield f"{between} % of {what} lies between the {tasks}, {100 - between} % within{of_that}"
