"""The used rows of a file task by task, and sums over tasks, for remarks that compare tasks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from quickbloom.common.datasets.own.columns import DATE, NUMBER, TIME
from quickbloom.common.datasets.own.files.tables import PIXELS
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.errors import as_told

if TYPE_CHECKING:
    from quickbloom.common.datasets.own.dataset import Own

ALL_KINDS = (NUMBER, DATE, TIME)
_MOST_NAMED = 5
_LEAST_LEFT = 10
"""Rows of a typical task that must be left if each is thinned out."""


@dataclass(frozen=True)
class Grouped:
    """Rows with a task that is used and a target.

    `names`: of the tasks. `rows`: int64 [n], task by task, and within a task in the order of the file. `place`: the task of
    each, int64 [n], ascending from 0. `starts`: where each task begins, int64 [tasks]. `columns`: kind and values [n] of
    every input that holds numbers, dates or times.
    """

    names: list[str]
    rows: Array
    place: Array
    starts: Array
    columns: dict[str, tuple[str, Array]]

    @classmethod
    def of(cls, data: Own) -> Grouped:
        codes, used = data.tasks_of_rows, ~np.isnan(data.target.values)
        if data.times is not None:
            used &= ~np.isnan(data.times)
        places = {name: place for place, name in enumerate(data.task_names)}
        new = np.full(len(places) + 1, -1, dtype=np.int64)  # the last is that of rows without a task
        new[[places[name] for name in data.rows]] = np.arange(len(data.rows))
        place = np.where(used, new[codes], -1)
        order = np.argsort(place, kind="stable")[int((place < 0).sum()) :]
        sizes = np.bincount(place[order], minlength=len(data.rows))
        columns = {}
        for name, kind in data.schema.features.items():
            column = data.inputs.get(name)
            if kind in ALL_KINDS and name != PIXELS and isinstance(column, np.ndarray):
                columns[name] = (kind, column[order])
        return cls(list(data.rows), order, place[order], np.cumsum(sizes) - sizes, columns)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def sizes(self) -> Array:
        """The number of rows of each task."""
        return np.diff(np.append(self.starts, len(self.rows)))

    def sums(self, numbers: Array) -> Array:
        """Return float64 [tasks], the sum of numbers [n] over each task."""
        return np.add.reduceat(numbers, self.starts)

    def thinned(self, most: int) -> Grouped:
        """Return about `most` rows: of each task every so manieth, or where tasks are small every so manieth task."""
        step = -(-len(self) // most)
        if step < 2:
            return self
        rank = np.arange(len(self)) - np.repeat(self.starts, self.sizes)
        kept = np.flatnonzero(rank % step == 0 if len(self) >= _LEAST_LEFT * step * len(self.names) else self.place % step == 0)
        held, place = np.unique(self.place[kept], return_inverse=True)
        starts = np.searchsorted(place.reshape(-1), np.arange(len(held)))
        columns = {name: (kind, column[kept]) for name, (kind, column) in self.columns.items()}
        return Grouped([self.names[task] for task in held], self.rows[kept], place.reshape(-1), starts, columns)

    def around_means(self, numbers: Array) -> Array:
        """Return the deviations of numbers [n], none missing, from the means of their tasks."""
        result: Array = numbers - np.repeat(self.sums(numbers) / self.sizes, self.sizes)
        return result

    def numbers(self) -> Iterator[tuple[str, Array]]:
        """Yield the name and the values [n] of every input that holds numbers, neither dates nor times."""
        yield from ((name, column) for name, (kind, column) in self.columns.items() if kind == NUMBER)

    def named(self, tasks: Array) -> str:
        """Return the names of some tasks in words: "A, B and 3 more"."""
        listed = [as_told(self.names[int(task)], 60) for task in tasks[:_MOST_NAMED]]
        more = f" and {len(tasks) - _MOST_NAMED} more" if len(tasks) > _MOST_NAMED else ""
        return ", ".join(listed) + more


def words_of(name: str) -> list[str]:
    """Return the words in a column's name, in lower case: "test_time2" and "testTime" give test and time."""
    return re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).casefold())
