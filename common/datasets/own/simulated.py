"""Simulated users of a user's own table: the column that says whose row it is is drawn, or another column says it.

See `common/partition.py` and docs/partitions.md. The table's own task column plays no part then, neither as users nor as an
input.
"""

from typing import TYPE_CHECKING

import numpy as np

from quickbloom.common.datasets.holdings import Holdings, held
from quickbloom.common.datasets.own.columns import require
from quickbloom.common.datasets.own.files.tables import Table
from quickbloom.common.datasets.own.options import OwnOptions
from quickbloom.common.datasets.own.text import Text
from quickbloom.common.datasets.partitioned import user_names
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.flower import partitioners
from quickbloom.common.partition import LEAST, Partition

if TYPE_CHECKING:
    from quickbloom.common.datasets.own.dataset import Own
    from quickbloom.common.datasets.own.target import Target


def prepare(table: Table, options: OwnOptions) -> OwnOptions:
    """Take the task column out of the table, and return the settings with the one that is to be. Raises DataError.

    The column of natural users is there already; that of others is there in name, until the target is read.
    """
    by = options.partition
    assert by is not None
    if options.split_column:
        raise ConfigError(
            "`own.split-column` says which rows are whose test part, and so does `partition`: leave one of them out"
        )
    if options.task_name:
        raise ConfigError(f"`own.task-name` names a single user, got '{options.task_name}' with `partition`: leave it out")
    if by.scheme.kind == "natural":
        column = by.scheme.column
        require(table, column, options.path)
        if options.task_column != column:
            table.pop(options.task_column, None)
        return _with(options, by, task_column=column)
    table[options.task_column] = Text(np.zeros(table.rows, dtype=np.int64), ["all"])
    return options


def _with(options: OwnOptions, by: Partition, **changes: str) -> OwnOptions:
    found = options.model_copy(update=changes).spread_by(by)
    assert isinstance(found, OwnOptions)
    return found


def assign(table: Table, options: OwnOptions, target: "Target") -> None:
    """Give every row with a target a user, as the task column says from now on. Raises DataError."""
    by = options.partition
    assert by is not None
    if by.scheme.kind == "natural":
        return
    known = ~np.isnan(target.values)
    if by.scheme.by_class and target.kind != "classification":
        raise DataError(
            f'`partition = "{by.text}"` spreads examples by their class, and the target holds numbers: use iid, size:linear or '
            "natural:COLUMN, or `own.kind=classification`"
        )
    classes = np.where(known, target.values if target.kind == "classification" else 0.0, -1.0).astype(np.int64)
    drawn = partitioners.draw(by, classes)
    codes = np.full(len(classes), -1, dtype=np.int64)
    for user, rows in enumerate(drawn):
        codes[rows] = user
    table[options.task_column] = Text(codes, user_names(len(drawn)))


def too_few(rows: int) -> str:
    """Return why a user with so few rows is left out, or ""."""
    return "" if rows >= LEAST else f"it has {rows} rows with a target, a user needs {LEAST}"


def holdings(own: "Own") -> Holdings:
    """Return who holds what of a file: rows by class, or of a quantity all rows of a user."""
    classes = own.classes if own.kind == "classification" else [""]
    places = own.target.values if own.kind == "classification" else np.zeros(len(own.target.values))
    return held(classes, {name: [places[part].astype(np.int64) for part in parts] for name, parts in own.rows.items()})
