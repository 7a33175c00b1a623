"""The column that orders a task's rows (`own.time-column`), read as numbers, dates or times like any other."""

import numpy as np

from quickbloom.common.datasets.own.columns import (
    DATE,
    EMPTY,
    NUMBER,
    TIME,
    Reading,
    Schema,
    find_kind,
    of_kind,
    refuse_infinite,
    usable,
)
from quickbloom.common.datasets.own.options import OwnOptions
from quickbloom.common.datasets.own.tables import Table
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.errors import DataError


def read_time(table: Table, schema: Schema, options: OwnOptions, reading: Reading) -> Array | None:
    """Return the moment of every row, float64 [rows], NaN where the cell is empty; None if no column is named.

    Its kind is that which all nodes agreed on, if it is an input as well. Raises DataError for cells that are no
    number, date or time.
    """
    name = options.time_column
    if not name:
        return None
    agreed = schema.features.get(name)
    kind = agreed if agreed in (NUMBER, DATE, TIME) else find_kind(table, name, reading, "leave the row out")
    if kind not in (NUMBER, DATE, TIME, EMPTY) or usable(table, name).ndim != 1:
        raise DataError(
            f"`--time` must name a column of numbers, dates or times, `{name}` of '{options.path}' holds something else: "
            "write dates as 2024-03-31, or number the rows of each task in order"
        )
    moments = of_kind(table, name, kind, reading)
    assert isinstance(moments, np.ndarray)
    refuse_infinite(name, moments)
    return moments
