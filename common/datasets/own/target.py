"""The target of a user's own data: its column, its kind (class or number), and its values."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from quickbloom.common.datasets.own.columns import (
    DATE,
    NUMBER,
    TEXT,
    TIME,
    Reading,
    Schema,
    find_kind,
    of_kind,
    refuse_target,
    require,
    usable,
)
from quickbloom.common.datasets.own.files.tables import Table
from quickbloom.common.datasets.own.options import OwnOptions, listed, quoted
from quickbloom.common.datasets.own.text import MISSING_WORDS, Array, Text, as_text, names
from quickbloom.common.errors import DataError

_MOST_CLASSES = 20
Kind = Literal["classification", "regression"]


class UnknownClassError(DataError):
    """The data hold classes that are not among the given ones. `labels`: those, in order; `label`: the one that is told."""

    def __init__(self, labels: list[str], given: list[str]) -> None:
        self.labels = sorted(labels, key=_rank)
        self.label = label = min(labels)
        super().__init__(
            f"`own.classes` must name every class of the data, '{label}' is missing from {quoted(given)!r}", f"'{label}'"
        )


@dataclass(frozen=True)
class Target:
    """The target of every row.

    `values`: float64 [rows], the position among `classes` or the number; NaN if missing. `labels`:
    for classes only.
    """

    kind: Kind
    classes: list[str]
    values: Array
    labels: Text | None = None


def pick_target(table: Table, options: OwnOptions) -> str:
    """Return the name of the target column. Raises DataError if it is unknown."""
    if options.target_column:
        require(table, options.target_column, options.path)
        return options.target_column
    for name in ("target", "label", "class", "y"):
        if name in table:
            return name
    raise DataError(f"the column of '{options.path}' to predict is not known: use `--target`, one of {', '.join(table)}")


def read_target(
    table: Table, name: str, options: OwnOptions, reading: Reading, agreed: Schema | None, rows: Array | None = None
) -> Target:
    """Return the target of every row, or of `rows` alone if a target is agreed. Raises DataError for cells that do not fit."""
    column = usable(table, name)
    if column.ndim != 1:
        raise DataError("the target must be one column, got images")
    if agreed:
        return _agreed_target(table, name, options, reading, agreed.classes, rows)
    kind = _kind_of_cells(table, name, options, reading)
    if options.kind == "classification" or kind not in (NUMBER, DATE, TIME):
        _refuse_words(column, options)
        return _classes(column, listed(options.classes, _labels(column, reading, ()).values), options, reading)
    found = _numbers(table, name, kind, reading)
    if options.kind == "regression" or kind != NUMBER or _is_number(column, found.values):
        return found
    return _classes(column, listed(options.classes, _labels(column, reading, ()).values), options, reading)


def _kind_of_cells(table: Table, name: str, options: OwnOptions, reading: Reading) -> str:
    if options.kind == "classification" or name in listed(options.categorical, table):
        return "text"
    advice = "ask for classes with `--set own.kind=classification`" if options.kind == "auto" else "leave the row out"
    return find_kind(table, name, reading, advice)


def _is_number(column: Array | Text, values: Array) -> bool:
    """Return whether numbers are a quantity; truth values and few distinct integers are classes."""
    known = values[~np.isnan(values)]
    truths = column.dtype.kind == "b" if isinstance(column, np.ndarray) else False
    return not truths and (bool((known != np.round(known)).any()) or len(np.unique(known)) > _MOST_CLASSES)


def _refuse_words(column: Array | Text, options: OwnOptions) -> None:
    if options.kind != "regression":
        return
    example = f"'{next((cell for cell in as_text(column).values), None)}'"
    raise DataError(f"the target must hold numbers for regression, got the text {example}", example)


def _agreed_target(
    table: Table, name: str, options: OwnOptions, reading: Reading, classes: list[str], rows: Array | None
) -> Target:
    if not classes:
        found = _agreed_numbers(table, name, reading)
        return found if rows is None else Target(found.kind, [], found.values[rows])
    column = usable(table, name)
    if rows is not None:
        column = column.take(rows) if isinstance(column, Text) else column[rows]
    return _classes(column, classes, options, reading)


def _agreed_numbers(table: Table, name: str, reading: Reading) -> Target:
    """Return the target from another file than in training; dates and times are numbers there as well."""
    kind = find_kind(table, name, reading, "leave the row out")
    if kind == TEXT:
        raise DataError(f"the target `{name}` of '{reading.path}' must hold numbers, as it did in training")
    return _numbers(table, name, kind, reading)


def _numbers(table: Table, name: str, kind: str, reading: Reading) -> Target:
    values = of_kind(table, name, kind, reading)
    assert isinstance(values, np.ndarray)
    refuse_target(values)
    return Target("regression", [], values)


def _labels(column: Array | Text, reading: Reading, classes: list[str] | tuple[str, ...]) -> Text:
    """Return the classes of the rows as text. A word such as `NA` is a class among words, or if it is in `classes`."""
    if not classes:
        return names(column, reading.extra_missing)
    gone = {*MISSING_WORDS, *reading.extra_missing}
    return as_text(column).mapped(lambda value: "" if value not in classes and value.casefold() in gone else value)


def _classes(column: Array | Text, given: list[str], options: OwnOptions, reading: Reading) -> Target:
    labels = _labels(column, reading, given)
    if extra := sorted(set(labels.values) - set(given)) if given else []:
        raise UnknownClassError(extra, given)
    classes = given or sorted(labels.values, key=_rank)
    if len(classes) < 2:
        raise DataError(f"the target must have at least two classes, got {len(classes)}: check `--target`")
    position = {label: float(place) for place, label in enumerate(classes)}
    of_values = np.array([position[label] for label in labels.values], dtype=np.float64)
    return Target("classification", classes, labels.spread(of_values, np.nan), labels)


def is_quantity(labels: list[str]) -> bool:
    """Return whether labels are numbers that are measured, as `own.kind = "auto"` decides: decimals, or many whole ones."""
    numbers = np.array([_number(label) for label in labels])
    return bool(np.isfinite(numbers).all()) and (len(labels) > _MOST_CLASSES or bool((numbers != np.round(numbers)).any()))


def _rank(label: str) -> tuple[float, str]:
    """Return what classes are sorted by: numbers by their value, then words."""
    return _number(label), label


def _number(label: str) -> float:
    try:
        return float(label)
    except ValueError:
        return float("inf")
