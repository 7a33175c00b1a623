"""Draws partitions with flwr-datasets' partitioners: which rows of a table are whose.

The result is that of `FederatedDataset(..., shuffle=True, seed=S)` with the scheme's partitioner of seed S: rows in random
order first, then the partitioner. A table is `datasets.Dataset` here only for its classes and the numbers of its rows.
"""

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np

from quickbloom.common.errors import DataError
from quickbloom.common.partition import LEAST, Partition
from quickbloom.common.system.extras import needs

Array = np.ndarray[Any, Any]

_MOST_CALLS = 100
"""How often a Dirichlet partitioner is asked, which draws eleven times and then gives up: 1,100 draws are the most."""
_ROW, _CLASS = "row", "class"


def load(module: str) -> Any:
    """Return a module of flwr-datasets or of what it builds on, without reports to Flower and the hub. Raises DataError."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when they are imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    needs("hub", "flwr_datasets", "the setting `partition`", error=DataError, load=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that they import
        return import_module(module)


def draw(partition: Partition, classes: Array, *, shuffled: bool = False) -> list[Array]:
    """Return the rows of every user: int64 [examples of the user], each row at most once, in random order.

    `classes`: int64 [rows], 0.. for every row, or -1 for rows that nobody gets. `shuffled`: the rows are in random order
    already, as `FederatedDataset` returns them. Raises DataError for a scheme that these rows do not fit.
    """
    scheme = partition.scheme
    usable = np.flatnonzero(classes >= 0)
    _check(partition, classes[usable])
    order = usable if shuffled else usable[np.random.default_rng(partition.seed).permutation(len(usable))]
    partitioner = _partitioner(partition, len(order))
    with _quiet():
        partitioner.dataset = _table(order, classes[order])
        try:
            _settle(partitioner, tries=_MOST_CALLS if scheme.kind == "dirichlet" else 1)
            found = [np.array(partitioner.load_partition(user)[_ROW][:], dtype=np.int64) for user in range(partition.number)]
        except ValueError as error:
            raise DataError(_impossible(partition, len(order), str(error))) from None
    _check_drawn(partition, found, len(order))
    return found


def users_by_name(values: list[Any]) -> dict[str, Array]:
    """Return the rows of every value of a column, by the value as text, in the order of the values. Raises DataError."""
    with _quiet():
        partitioner = load("flwr_datasets.partitioner").NaturalIdPartitioner(partition_by=_CLASS)
        partitioner.dataset = _table(np.arange(len(values)), values)
        number = partitioner.num_partitions
        found = [np.array(partitioner.load_partition(user)[_ROW][:], dtype=np.int64) for user in range(number)]
        return {str(partitioner.partition_id_to_natural_id[user]): rows for user, rows in enumerate(found)}


def _table(rows: Array, classes: Any) -> Any:
    """Return the table that a partitioner divides."""
    dataset = load("datasets").Dataset

    class Table(dataset):  # type: ignore[misc, valid-type]
        """Hands out a column as a list, since a partitioner would read it cell by cell, which takes seconds."""

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            return found[:] if isinstance(key, str) else found

    return Table.from_dict({_ROW: rows, _CLASS: classes})


def _partitioner(partition: Partition, rows: int) -> Any:
    """Return the scheme's partitioner of flwr-datasets."""
    kinds, scheme = load("flwr_datasets.partitioner"), partition.scheme
    users, by = partition.number, {"partition_by": _CLASS, "seed": partition.seed}
    if scheme.kind == "dirichlet":
        return kinds.DirichletPartitioner(
            users, alpha=scheme.number, min_partition_size=max(partition.least, LEAST), self_balancing=scheme.balanced, **by
        )
    if scheme.kind == "pathological":
        # The first class of each user in turn: with "random" there may be classes that nobody has.
        mode = {"num_classes_per_partition": int(scheme.number), "class_assignment_mode": "first-deterministic"}
        return kinds.PathologicalPartitioner(users, **mode, **by)
    if scheme.kind == "shards":
        # The size of a shard is given, and the last may be smaller, since the rows that are left over would else be nobody's.
        size = math.ceil(rows / (users * int(scheme.number)))
        return kinds.ShardPartitioner(users, shard_size=size, keep_incomplete_shard=True, **by)
    if scheme.sizes:
        return kinds.SizePartitioner(list(scheme.sizes))
    curve = {"": "Iid", "linear": "Linear", "square": "Square", "exponential": "Exponential"}[scheme.curve]
    return getattr(kinds, f"{curve}Partitioner")(num_partitions=users)


def _settle(partitioner: Any, tries: int) -> None:
    """Let the partitioner decide whose the rows are. Each try goes on with its random numbers where the last one ended."""
    for number in range(tries):
        try:
            partitioner.load_partition(0)
            return
        except ValueError:
            if number == tries - 1:
                raise


def _check(partition: Partition, classes: Array) -> None:
    """Raise DataError for what cannot work, and would end in a long search or in a sentence about arguments."""
    scheme, rows, users = partition.scheme, len(classes), partition.number
    held = len(np.unique(classes))
    if rows < LEAST * users:
        raise DataError(
            f"`users` must be at most {rows // LEAST} for {rows} examples, of which each user needs {LEAST}, got {users}: take "
            "fewer users"
        )
    if scheme.kind == "dirichlet" and rows < partition.least * users:
        raise DataError(
            f"`least-per-user` must be at most {rows // users} for {rows} examples of {users} users, got {partition.least}: "
            "lower it, or take fewer users"
        )
    if scheme.kind == "pathological" and scheme.number > held:
        raise DataError(
            f"`partition` must give each user at most the {held} classes that there are, got '{partition.text}': take fewer"
        )
    if sum(scheme.sizes) > rows:
        raise DataError(f"the sizes of `partition` must sum up to at most the {rows} examples, got {sum(scheme.sizes)}")


def _check_drawn(partition: Partition, users: list[Array], rows: int) -> None:
    least, given = min(map(len, users)), sum(map(len, users))
    if least < LEAST:
        raise DataError(
            f'`partition = "{partition.text}"` leaves a user with {least} of {rows} examples, each needs {LEAST}: take fewer '
            "users than "
            f"{partition.number}"
        )
    if given < rows and not partition.scheme.sizes:
        raise DataError(
            f'`partition = "{partition.text}"` leaves {rows - given} of {rows} examples to nobody, because no user drew their '
            f"class: take more users than {partition.number}, or more classes for each"
        )


def _impossible(partition: Partition, rows: int, reason: str) -> str:
    if partition.scheme.kind == "dirichlet":
        return (
            f'`partition = "{partition.text}"` gives no {partition.number} users with at least {partition.least} of '
            f"{rows} examples each, in {11 * _MOST_CALLS} draws: raise the number after dirichlet, take fewer users, or lower "
            "`least-per-user`"
        )
    why = reason.split(". ")[0]
    told = f'`partition = "{partition.text}"` cannot be drawn for {partition.number} users of {rows} examples'
    return f"{told} ({why}): take fewer users"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what partitioners print and warn of: every draw that is repeated, and a bar of progress."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
