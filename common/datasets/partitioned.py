"""One table of examples, spread over simulated users: what the data sets that can do so have in common.

The settings are those of the run (`partition`, `users`, ..): see `common/partition.py` and docs/partitions.md.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from pydantic import PrivateAttr

from quickbloom.common.datasets.base import DataSpec, FixedSplitDataset, TaskInfo
from quickbloom.common.datasets.holdings import Holdings, held
from quickbloom.common.errors import DataError
from quickbloom.common.flower import partitioners
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.options import Options
from quickbloom.common.partition import LEAST, Partition

Array = np.ndarray[Any, Any]
Take = Callable[[str, Array], Array]
"""Returns the inputs of some of a user's examples: float32 [examples, ..], by name and positions among theirs."""
_Made = TypeVar("_Made")
TOO_FEW = f"a user needs {LEAST} examples, one each for support, query and test"
_MOST_COPIES = 4
"""Examples per different one above which copies count one by one."""


class PartitionedOptions(Options):
    """Settings of a data set that can spread one table over simulated users.

    The partition is set by the run, not in the data set's own table of settings, and two settings with different ones are
    different.
    """

    _partition: Partition | None = PrivateAttr(None)

    @property
    def partition(self) -> Partition | None:
        """How the table is spread; None: as the data set says itself."""
        return self._partition

    def spread_by(self, partition: Partition | None) -> "PartitionedOptions":
        """Return the same settings with this partition."""
        found = self.model_copy()
        found._partition = partition
        return found


class OnDemand(dict[str, _Made]):
    """Tasks whose examples are made at first use: with 100,000 users, a round needs only a few."""

    def __init__(self, make: Callable[[str], _Made]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, task_id: str) -> _Made:
        data = self[task_id] = self._make(task_id)
        return data


class PartitionedDataset(FixedSplitDataset):
    """A data set of classes whose users are simulated. The table is in memory once; a user's examples are made on demand."""

    partition: ClassVar[str] = "dirichlet:0.1"
    users: ClassVar[int] = 20
    """The partition where the run names none: the field's usual one."""
    _spec: DataSpec | None = None

    @property
    def is_spread(self) -> bool:
        """Whether the users are simulated."""
        return self._spec is not None

    def spread(
        self, labels: Mapping[str, Array], classes: Sequence[str], shape: tuple[int, ...], take: Take, by: Partition
    ) -> None:
        """Give every user a support, a query and a test part. Users with too few examples are left out.

        `labels`: int64 [examples] by the name of the user, in random order. `take`: see `Take`.
        """
        self._spec = DataSpec("classification", shape, len(classes))
        self._classes, self._labels, self._take = list(classes), labels, take
        self.left_out = {name: TOO_FEW for name, held in labels.items() if len(held) < LEAST}
        self._parts = {name: cut(held, by.shares) for name, held in labels.items() if len(held) >= LEAST}
        self._data = OnDemand(self._task_data)

    @property
    def spec(self) -> DataSpec:
        assert self._spec is not None
        return self._spec

    def tasks(self) -> list[TaskInfo]:
        if not self.is_spread:
            return super().tasks()
        return [TaskInfo(name, len(support), len(query), len(test)) for name, (support, query, test) in self._parts.items()]

    def holdings(self) -> Holdings | None:
        """Return who holds what; None for users that are not simulated."""
        if not self.is_spread:
            return None
        return held(self._classes, {name: [self._labels[name][part] for part in parts] for name, parts in self._parts.items()})

    def _task_data(self, name: str) -> TaskData:
        return TaskData(*(self._batch(name, part) for part in self._parts[name]))

    def _batch(self, name: str, rows: Array) -> Batch:
        return Batch.of(torch.from_numpy(self._take(name, rows)), torch.from_numpy(self._labels[name][rows]))


def user_names(number: int) -> list[str]:
    """Return user-00, user-01, .. with as many digits as all of them need."""
    digits = max(2, len(str(number - 1)))
    return [f"user-{user:0{digits}d}" for user in range(number)]


def in_memory(partition: Partition, classes: Array) -> dict[str, Array]:
    """Return the rows of every simulated user by name, of a table with these classes, int64 [rows]. Raises DataError."""
    if partition.scheme.kind == "natural":
        raise DataError(
            f'`partition = "{partition.text}"` is for data with columns, a file of your own or hub:NAME, and these have none: '
            "choose another partition"
        )
    drawn = partitioners.draw(partition, classes)
    return dict(zip(user_names(len(drawn)), drawn, strict=True))


def cut(strata: Array, shares: tuple[float, float, float], copies: Array | None = None) -> list[Array]:
    """Return the positions of a user's support, query and test examples, ascending; none is empty from three examples on.

    `strata`: the class of each example [n]. Every part gets its share of all examples to one, and of each class to about
    one, in the order in which they come: each example goes where most is owed, which is the part that is farthest behind
    its share of the examples so far, class by class. `copies`: equal for examples that must stay together [n], unless there
    are too many of them.
    """
    n = len(strata)
    order = np.argsort(strata, kind="stable") if copies is None else np.lexsort((copies, strata))
    starts = np.arange(n) if copies is None else _starts(strata[order], copies[order])
    ends = np.append(starts[1:], n)
    done, owed = np.zeros(3), np.array(shares)
    part_of = np.empty(len(starts), dtype=np.int64)
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        part_of[group] = part = int((owed * end - done).argmax())
        done[part] += end - start
    _fill(part_of, ends - starts)
    where = np.empty(n, dtype=np.int64)
    where[order] = np.repeat(part_of, ends - starts)
    return [np.flatnonzero(where == part) for part in range(3)]


def _starts(strata: Array, copies: Array) -> Array:
    """Return where groups of examples that stay together begin, in an order in which they are neighbours."""
    new = np.flatnonzero(np.append(True, (copies[1:] != copies[:-1]) | (strata[1:] != strata[:-1])))
    enough = len(new) >= LEAST and len(new) * _MOST_COPIES >= len(strata)
    return new if enough else np.arange(len(strata))


def _fill(part_of: Array, sizes: Array) -> None:
    """Let every part have an example: small shares of few examples may come to nothing. The largest part gives some away.

    `part_of`, `sizes`: of every group of examples that stay together; the last one of the smallest moves as a whole.
    """
    for part in range(3):
        groups = np.bincount(part_of, minlength=3)
        if not groups[part] and groups.max() > 1:
            giver = np.where(groups > 1, np.bincount(part_of, sizes, minlength=3), 0).argmax()
            mine = np.flatnonzero(part_of == giver)
            part_of[mine[sizes[mine] == sizes[mine].min()][-1]] = part
