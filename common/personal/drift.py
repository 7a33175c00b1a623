"""What the rows showed that a model adapted to, without holding them, and which other rows lie outside of that.

A card keeps, for each column of the user's own file, the least and the largest number, or the keys of the categories (hashes,
see `datasets.own.vocabulary`). A row lies outside if one of its numbers is beyond this range by more than a deviation,
or one of its categories is none of these.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from quickbloom.common.datasets.own import Own
from quickbloom.common.datasets.own.columns import TEXT, Inputs, Schema, categories, usable
from quickbloom.common.datasets.own.dataset import reading_of
from quickbloom.common.datasets.own.files.tables import Table
from quickbloom.common.datasets.own.options import OwnOptions
from quickbloom.common.datasets.own.preparation import Preparation
from quickbloom.common.datasets.own.text import Array, Text
from quickbloom.common.datasets.own.vocabulary import key

LEAST_ROWS = 10
"""Rows from which their range says something about others."""
_USUAL = 0.05
"""Share of rows outside in a column that is nothing to remark on: rows like those adapted to have that as well."""


def seen(own: Own, task_id: str) -> dict[str, Any]:
    """Return what the support rows of a task show: {"numbers": {column: [least, largest]}, "categories": {column: [key, ..]}}.

    Empty for fewer than `LEAST_ROWS`. Left out are images, columns without a number, and categories that are hardly ever twice
    the same, such as names: every new one is unseen.
    """
    rows = own.rows[task_id][0]
    numbers: dict[str, list[float]] = {}
    keys: dict[str, list[str]] = {}
    if len(rows) < LEAST_ROWS:
        return {}
    for name, kind in own.schema.features.items():
        if kind == TEXT:
            text = _categories(own.table, name, own.options).take(rows)
            held = np.flatnonzero(text.counts())
            if 2 * len(held) <= len(rows):
                keys[name] = sorted(key(name, text.values[place]) for place in held)
        elif (found := _numbers(own.inputs, name, rows)) is not None and len(found):
            numbers[name] = [float(found.min()), float(found.max())]
    return {"numbers": numbers, "categories": keys}


def outside(
    shown: Mapping[str, Any],
    preparation: Preparation,
    schema: Schema,
    table: Table,
    options: OwnOptions,
    rows: Array,
    inputs: Inputs,
) -> dict[str, Array]:
    """Return which of the rows lie outside, bool [rows], by column, for each column where that is more than 1 in 20.

    `shown`: see `seen`; `preparation`: of the same rows; `inputs`: those of `rows`, positions in `table`.
    """
    found: dict[str, Array] = {}
    for name, (least, largest) in shown.get("numbers", {}).items():
        column = inputs.get(name)
        if isinstance(column, np.ndarray) and name in preparation.numbers:
            slack = preparation.numbers[name].deviation
            found[name] = (column < least - slack) | (column > largest + slack)  # a missing one is neither
    for name, keys in shown.get("categories", {}).items():
        if schema.features.get(name) == TEXT and name in table:
            text = _categories(table, name, options).take(rows)
            known = set(keys)
            unknown = np.array([key(name, value) not in known for value in text.values], dtype=bool)
            found[name] = text.spread(unknown, False)
    return {name: rows for name, rows in found.items() if rows.mean() > _USUAL}


def _categories(table: Table, name: str, options: OwnOptions) -> Text:
    return categories(usable(table, name), reading_of(options).extra_missing)


def _numbers(inputs: Inputs, name: str, rows: Array) -> Array | None:
    """Return the known numbers of a column; None for images."""
    column = inputs[name]
    if not isinstance(column, np.ndarray) or column.ndim > 1:
        return None
    found: Array = column[rows][~np.isnan(column[rows])]
    return found
