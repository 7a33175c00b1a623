"""Cuts the rows of a task into support, query and test part, as the settings `own.*` say.

Rows are drawn by a hash of their content (`row_order`), or in order of time (`time_order`). A column
can say which rows are test rows, or to which split whole tasks belong.
"""

from dataclasses import dataclass

import numpy as np

from quickbloom.common.datasets import row_order, time_order
from quickbloom.common.datasets.base import SPLITS
from quickbloom.common.datasets.own import simulated
from quickbloom.common.datasets.own.columns import usable
from quickbloom.common.datasets.own.files.tables import Table
from quickbloom.common.datasets.own.options import OwnOptions
from quickbloom.common.datasets.own.target import Target
from quickbloom.common.datasets.own.text import Array, Text, names
from quickbloom.common.datasets.partitioned import cut
from quickbloom.common.errors import DataError
from quickbloom.common.formatting import counted

_PARTS = (0.4, 0.7)
"""Shares of a task's rows at which the support and the query part end, if neither `own.shots` nor `partition` says it."""


def read_splits(table: Table, column: str) -> Text | None:
    """Return "train", "validation" or "test" for every row; None if `column` is "". Raises DataError for other words."""
    if not column:
        return None
    said = names(usable(table, column))
    held = {said.values[code] if code >= 0 else "" for code in np.unique(said.codes)}
    if wrong := sorted(held - set(SPLITS)):
        got = f"'{wrong[0]}'"
        raise DataError(f"the column `{column}` must hold train, validation or test, got {got}", got)
    return said


@dataclass(frozen=True)
class Cutting:
    """What decides where the rows of a task are cut, for all rows of a file.

    `content`: a hash of each row, uint64 [rows]. `times`: the moment of each row, float64 [rows], NaN:
    unknown; None: rows are drawn by content. `published`: what the split column says.
    """

    options: OwnOptions
    target: Target
    content: Array
    times: Array | None
    published: Text | None

    def of(self, rows: Array, *, whole: bool) -> tuple[Array, str, list[Array] | str]:
        """Return the usable ones of a task's `rows`, the split that is published for the task or "", and its three parts.

        The parts are positions among the usable rows: support, query and test; or the reason why there are none.
        `whole`: all are support, the other parts are empty.
        """
        known = rows[~np.isnan(self.target.values[rows])]
        if self.times is not None:
            known = known[~np.isnan(self.times[known])]
        forced, split = self._forced(known)
        return known, split, self._all(known) if whole else self._cut(known, forced)

    def _forced(self, rows: Array) -> tuple[Array, str]:
        """Return which rows are test rows, and the split of the whole task, which exists if all its rows say the same."""
        if self.published is None or not len(rows):
            return np.zeros(len(rows), dtype=bool), ""
        said = self.published.take(rows).cells()
        if len(set(said)) == 1:
            return np.zeros(len(rows), dtype=bool), str(said[0])
        return np.array([value == "test" for value in said]), ""

    def _all(self, rows: Array) -> list[Array] | str:
        """Return the positions of all rows as support, and two empty parts; or the reason if there are none."""
        every = np.arange(len(rows))
        moment = f" and a moment (`{self.options.time_column}`)" if self.times is not None else ""
        return [every, every[:0], every[:0]] if len(rows) else f"it has no row with a target{moment}"

    def _cut(self, rows: Array, forced: Array) -> list[Array] | str:
        """Return the positions of support, query and test, or a reason if the task has too few rows."""
        if self.times is not None:
            return self._cut_in_time(rows, forced, self.times[rows])
        strata, content = self._strata(rows), self.content[rows]
        shots, has_test = self.options.shots, bool(forced.any())
        if reason := self._too_few(strata, forced):
            return reason
        if self.options.partition is not None and not shots:
            return simulated.too_few(len(rows)) or cut(strata, self.options.partition.shares, content)
        parts: list[list[int]] = [[], [], []]
        for stratum in np.unique(strata):
            members = ((strata == stratum) & ~forced).nonzero()[0]
            number = len(members)
            if number:
                first, second = self._ends(number, has_test=has_test)
                for part, chosen in zip(parts, row_order.cut(content[members], first, second, exact=shots > 0), strict=True):
                    part += members[chosen].tolist()
        parts[2] += forced.nonzero()[0].tolist()
        if not all(parts):
            told = counted(len(rows), "row")
            return f"it has {told} with a target, too few for support, query and test: 3 of a class are the least"
        return [np.array(sorted(part)) for part in parts]

    def _strata(self, rows: Array) -> Array:
        """Return the class of each row; numbers are of one."""
        return self.target.values[rows] if self.target.kind == "classification" else np.zeros(len(rows))

    def _too_few(self, strata: Array, forced: Array) -> str:
        """Return the reason if a task has too few rows of a class for `own.shots`, else ""."""
        shots, least = self.options.shots, 1 if forced.any() else 2
        found, classes = np.unique(strata), len(self.target.classes)
        if shots and self.target.kind == "classification" and len(found) < classes:
            return f"it has examples of {len(found)} of {classes} classes, `own.shots` needs {shots} + 2 of each"
        for stratum in found if shots else ():
            number = int(((strata == stratum) & ~forced).sum())
            if number < shots + least:
                return f"it has {number} rows of a class, `own.shots` needs {shots} for support and others to test"
        return ""

    def _cut_in_time(self, rows: Array, forced: Array, moments: Array) -> list[Array] | str:
        """Return the same three parts, each before the next in time and in its order, or a reason.

        Classes have no part in it, but for `own.shots`: a model is used on what comes, and of that nobody chooses
        the classes.
        """
        strata, name = self._strata(rows), self.options.time_column
        free, given = np.flatnonzero(~forced), np.flatnonzero(forced)
        if reason := self._too_few(strata, forced):
            return reason
        if not time_order.is_before(moments[free], moments[given]):
            return f"`{self.options.split_column}` calls rows test that do not come after all others in `{name}`"
        if self.options.shots and len(free):
            support, rest = (free[part] for part in time_order.first_of_each(moments[free], strata[free], self.options.shots))
            later = [rest] if len(given) else [rest[part] for part in time_order.cut(moments[rest], (len(rest) + 1) // 2)]
            parts = [support, *later] if len(rest) else []
        else:
            ends = self._ends(len(free), has_test=bool(len(given)))
            parts = [free[part] for part in time_order.cut(moments[free], *ends[: 1 if len(given) else 2])]
        if len(given):
            parts.append(given[np.argsort(moments[given], kind="stable")])
        if len(parts) < 3:
            told, different = counted(len(rows), "row"), counted(len(np.unique(moments)), "moment")
            return f"it has {told} of {different} in `{name}`, too few for support, query and test, which share no moment"
        return parts

    def _ends(self, number: int, *, has_test: bool) -> tuple[int, int]:
        """Return where the support and the query part of a class of `number` rows end."""
        shots, by = self.options.shots, self.options.partition
        ends = (by.shares[0], by.shares[0] + by.shares[1]) if by else _PARTS
        first = shots or max(1, round(ends[0] * number))
        if has_test:
            return first, max(first + 1, number)
        second = first + (number - first + 1) // 2 if shots else round(ends[1] * number)
        return first, max(first + 1, second)
