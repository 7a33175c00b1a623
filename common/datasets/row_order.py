"""The order in which a task's rows are drawn: by a hash of their content, so that no name of a file or a task matters.

The same rows give the same parts in any file and in any order. Exact copies of a row go to one part, since a
model would be tested on what it adapted to. This needs enough different rows: where a class has fewer than
three, or fewer than a quarter of its rows are different (a few categories and nothing else), copies are
observations like any others and are drawn one by one.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from quickbloom.common.datasets.own.text import Array, Text

_MOST_COPIES = 4
"""Rows per different row above which copies are drawn one by one."""


def content_of(columns: Iterable[Text | Array]) -> Array:
    """Return a hash of the cells of every row: uint64 [rows], equal for equal cells. An empty column does not count."""
    columns = list(columns)
    blocks = [_bytes(column) for column in columns if _holds_anything(column)]
    rows = np.concatenate(blocks, axis=1) if blocks else np.zeros((len(columns[0]), 1), dtype=np.uint8)
    return np.array([_hash(row.tobytes()) for row in rows], dtype=np.uint64)


def cut(content: Array, first: int, second: int, *, exact: bool = False) -> list[Array]:
    """Return the positions of three parts that end at about `first`, `second` and all rows, in the order of the hashes.

    `content`: of the rows of one class. Copies stay together, so the ends are the nearest ones that are
    possible. `exact`: the first part has `first` rows, if need be with a copy of a row elsewhere.
    """
    order = np.argsort(content, kind="stable")
    if not (np.diff(content[order]) == 0).any():  # as with most data; of many small tasks the rest would take long
        return [order[:first], order[first:second], order[second:]]
    groups = _groups(content, 3)
    if len(groups) == len(content):
        order = np.concatenate(groups)
        return [order[:first], order[first:second], order[second:]]
    if exact:
        support, groups = _filled(groups, first)
    else:
        end = _nearest(groups, first, 1, len(groups) - (1 if second == len(content) else 2))
        support, groups = groups[:end], groups[end:]
    chosen, rest = np.concatenate(support), np.concatenate(groups)
    if second == len(content):  # two parts alone
        return [chosen, rest, rest[:0]]
    wanted = second - len(chosen)
    end = wanted if len(groups) == 1 else sum(map(len, groups[: _nearest(groups, wanted, 1, len(groups) - 1)]))
    return [chosen, rest[:end], rest[end:]]


def folds(content: Array, strata: Array, most: int) -> tuple[Array, int]:
    """Return the fold of every row for a cross-validation, -1: never held out, and the number of folds; 0: too few rows.

    Each fold has about as many rows of each class (`strata`) and at least two rows. Copies are in one fold. A
    class without two different rows is never held out, since nothing would show the class then.
    """
    groups = [
        [np.flatnonzero(strata == stratum)[group] for group in _groups(content[strata == stratum], 1)]
        for stratum in np.unique(strata)
    ]
    dealt = [group for of_class in groups if len(of_class) > 1 for group in of_class]
    number = min(most, len(dealt) // 2)
    result = np.full(len(content), -1, dtype=np.int64)
    if number < 2:
        return result, 0
    for place, group in enumerate(dealt):
        result[group] = place % number
    return result, number


def _bytes(column: Text | Array) -> Array:
    """Return the cells as uint8 [rows, n], equal for equal cells."""
    if isinstance(column, Text):
        hashes = np.array([_hash(value.encode()) for value in column.values], dtype=np.uint64)
        return column.spread(hashes, 0)[:, None].view(np.uint8)
    if column.ndim == 1:
        column = np.where(np.isnan(column), np.nan, column.astype(np.float64) + 0.0)  # one NaN, and no -0
    return np.ascontiguousarray(column.reshape(len(column), -1)).view(np.uint8)


def _holds_anything(column: Text | Array) -> bool:
    if isinstance(column, Text):
        return bool((column.codes >= 0).any())
    return column.ndim > 1 or not np.isnan(column).all()


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, person=b"quickbloom rows").digest(), "little")


def _groups(content: Array, least: int) -> list[Array]:
    """Return the positions of equal rows, by hash; each row by itself if there are fewer than `least` groups or many copies."""
    order = np.argsort(content, kind="stable")
    starts = np.flatnonzero(np.diff(content[order])) + 1
    groups = np.split(order, starts)
    if len(groups) >= least and len(groups) * _MOST_COPIES >= len(content):
        return groups
    copies = [_hash(b"%d %d" % (content[group[0]], copy)) for group in groups for copy in range(len(group))]
    return list(order[np.argsort(np.array(copies, dtype=np.uint64), kind="stable")][:, None])


def _filled(groups: Sequence[Array], size: int) -> tuple[list[Array], list[Array]]:
    """Return groups of `size` rows together, and all others. A group is taken apart only if nothing else fits."""
    taken: list[Array] = []
    rest: list[Array] = []
    for group in groups:
        fits = len(group) <= size
        (taken if fits else rest).append(group)
        size -= len(group) if fits else 0
    if size:
        taken.append(rest[0][:size])
        rest[0] = rest[0][size:]
    return taken, rest


def _nearest(groups: Sequence[Array], size: int, least: int, most: int) -> int:
    """Return the number of groups, from `least` to `most`, whose rows are nearest to `size`; the fewer of two."""
    ends = np.cumsum([len(group) for group in groups])[least - 1 : most]
    return least + int(np.abs(ends - size).argmin())
