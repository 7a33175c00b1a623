"""Rows that are in the file twice: in two tasks, or in the support and the test part of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from quickbloom.common.datasets.own.columns import categories, usable
from quickbloom.common.datasets.own.encoded import Encoded, Tokens
from quickbloom.common.datasets.own.files.tables import PIXELS
from quickbloom.common.datasets.own.remarks.grouped import Grouped
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.datasets.own.vocabulary import Places

if TYPE_CHECKING:
    from quickbloom.common.datasets.own.dataset import Own

_LEAST, _SHARE, _NEAR_SHARE = 3, 0.01, 0.05
"""Fewest rows, and least share of the rows, for a remark on copies and on rows that are nearly copies."""
_SAMPLE = 2000
_MEASUREMENT = 1 / 200
"""Chance that two cells of a column are equal below which it holds measurements, so that equal rows are no chance."""
_MOST_TASKS, _LEAST_TEST, _MOST_TEST, _MOST_PAIRS = 30, 5, 100, 100_000
"""Tasks, and test rows of each, that are compared with all its support rows."""
_NEAR = 0.01
"""Deviations, in every column, within which two rows are nearly copies."""
_CROWDED = 0.5
"""Share of the pairs within ten times that distance which must lie within it: of what varies smoothly it is a tenth or less."""


def remarks(data: Own, grouped: Grouped) -> Iterator[str]:
    """Yield remarks on copies, exact and nearly so."""
    content = data.content[grouped.rows]
    order = np.argsort(content, kind="stable")
    same = np.diff(content[order].astype(np.int64)) == 0
    if same.sum() >= max(1, _SHARE * len(content) / 2):
        yield from _copies(data, grouped, order, same)
    if not data.whole and PIXELS not in data.inputs:
        yield from _nearly(data)


def _copies(data: Own, grouped: Grouped, order: Array, same: Array) -> Iterator[str]:
    """Yield remarks on exact copies. `order`: positions by content; `same`: whether the next has the same."""
    group = np.cumsum(np.append(False, ~same)) if len(order) > 1 else np.zeros(len(order), dtype=np.int64)
    place = grouped.place[order]
    first = np.searchsorted(group, group)
    last = np.searchsorted(group, group, side="right") - 1
    shared = place[first] != place[last]
    if _is_many(int(shared.sum()), len(order)) and _holds_measurements(data, grouped):
        yield (
            f"{shared.sum()} of {len(order)} rows are copies of a row of another task: leave each in the task that it belongs "
            "to, else a held-out task has been trained on"
        )
    if data.whole:
        return
    part = np.full(data.table.rows, -1)
    for rows in data.rows.values():
        for which in (0, 2):
            part[rows[which]] = which
    part = part[grouped.rows[order]]
    both = group * len(grouped.names) + place
    tested = part == 2
    known = tested & np.isin(both, both[part == 0])
    if _is_many(int(known.sum()), int(tested.sum())) and _holds_measurements(data, grouped):
        yield (
            f"{known.sum()} of {tested.sum()} test rows are copies of a support row of their task: remove copies, else a score "
            "says how well rows are remembered"
        )


def _is_many(copies: int, rows: int) -> bool:
    return copies >= max(_LEAST, _SHARE * rows)


def _holds_measurements(data: Own, grouped: Grouped) -> bool:
    """Return whether two rows are hardly ever equal by chance: whether a column has values that are hardly ever equal."""
    if PIXELS in data.inputs:
        return len(np.unique(data.content[grouped.rows])) > len(grouped) / 2
    chosen = grouped.rows[:: len(grouped) // _SAMPLE + 1]
    chances = [_chance(_cells(column)[chosen]) for column in data.inputs.values()]
    return min(chances) < _MEASUREMENT and float(np.prod(chances)) * len(grouped) < _SHARE


def _cells(column: Array | Places | Encoded | Tokens) -> Array:
    """Return a number for every cell, equal for equal cells."""
    if isinstance(column, Places):
        return column.at
    return column.codes if isinstance(column, Encoded | Tokens) else column


def _chance(cells: Array) -> float:
    """Return the chance that two cells are equal (Simpson's index)."""
    counts = np.unique(cells, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1)).sum() / max(1.0, len(cells) * (len(cells) - 1.0)))


def _nearly(data: Own) -> Iterator[str]:
    """Yield a remark if test rows have a support row so close that it stands out from all other distances."""
    columns = list(_columns(data))
    if columns[0][1] <= 0:
        return
    listed = list(data.rows.values())
    near = crowd = rows = tested = 0
    for support, _, test in listed[:: -(-len(listed) // _MOST_TASKS)]:
        chosen = test[:: len(test) // min(_MOST_TEST, max(_LEAST_TEST, _MOST_PAIRS // len(support))) + 1]
        at, distance = _close_pairs(columns, chosen, support, 10 * _NEAR)
        close = (distance > 0) & (distance <= _NEAR)
        near += int(close.sum())
        crowd += int((distance > 0).sum())
        rows += len(np.unique(at[close]))
        tested += len(chosen)
    if rows >= max(_LEAST, _NEAR_SHARE * tested) and near >= _CROWDED * crowd:
        yield (
            f"{rows} of {tested} test rows that were looked at are nearly copies of a support row, within {_NEAR:g} deviations "
            "in every column: if they are repeated measurements, keep them in one part with `own.split-column`"
        )


def _columns(data: Own) -> Iterator[tuple[Array, float]]:
    """Yield every input and the target, with the distance that counts as 1: numbers in deviations, categories equal or not (0).

    The column with most different values comes first: few rows are close to each other in it.
    """
    found = [(data.target.values, _deviation(data.target.values) if data.kind == "regression" else 0.0)]
    for name in data.schema.features:
        column = data.inputs.get(name)
        if column is None:  # the features of another column are those of this one as well
            continue
        if isinstance(column, Encoded | Tokens):
            found.append((column.codes.astype(np.float64), 0.0))
        elif isinstance(column, Places):
            found.append((categories(usable(data.table, name)).codes.astype(np.float64), 0.0))
        else:
            found.append((column, _deviation(column)))
    sampled = [len(np.unique(column[:: len(column) // _SAMPLE + 1])) if unit > 0 else 0 for column, unit in found]
    yield from (found[place] for place in sorted(range(len(found)), key=lambda place: -sampled[place]))


def _deviation(column: Array) -> float:
    known = column[:: len(column) // _SAMPLE + 1]
    known = known[~np.isnan(known)]
    return float(known.std()) if len(known) else 0.0


def _close_pairs(columns: list[tuple[Array, float]], first: Array, second: Array, most: float) -> tuple[Array, Array]:
    """Return pairs of rows that differ by at most `most` in every column: positions in `first`, and the largest difference."""
    column, unit = columns[0]
    order = second[np.argsort(column[second], kind="stable")]
    low, high = (
        np.searchsorted(column[order], column[first] + sign * most * unit, side=side)  # type: ignore[call-overload]
        for sign, side in ((-1, "left"), (1, "right"))
    )
    number = np.where(np.isnan(column[first]), 0, high - low)
    at = np.repeat(np.arange(len(first)), number)
    other = order[np.arange(len(at)) - np.repeat(np.cumsum(number) - number, number) + np.repeat(low, number)]
    largest = np.zeros(len(at))
    for column, unit in columns:
        mine, theirs = column[first[at]], column[other]
        difference = np.where(np.isnan(mine) & np.isnan(theirs), 0.0, np.abs(mine - theirs))
        distance = difference / unit if unit > 0 else np.where(difference > 0, np.inf, difference)
        kept = distance <= most
        at, other, largest = at[kept], other[kept], np.maximum(largest[kept], distance[kept])
    return at, largest
