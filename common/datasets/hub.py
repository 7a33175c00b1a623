"""A data set of the Hugging Face hub, `--dataset hub:NAME`, spread over simulated users: images or numbers, and classes.

`FederatedDataset` of flwr-datasets opens it, from the hub, its cache, or a local folder with the same layout. Its cells stay in
files: a node reads the examples of the users that it hosts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from quickbloom.common.datasets.partitioned import PartitionedDataset, PartitionedOptions, user_names
from quickbloom.common.errors import DataError, did_you_mean
from quickbloom.common.flower import hub, partitioners
from quickbloom.common.partition import Partition
from quickbloom.common.system.extras import needs

Array = np.ndarray[Any, Any]
_LABELS = ("label", "labels", "target", "class", "y", "fine_label")
_MOST_CLASSES = 1000


class HubOptions(PartitionedOptions):
    """Settings of the data set `hub`."""

    name: str = Field("", description="the data set as the hub names it, or a local folder in its layout")
    subset: str = Field("", description='its configuration; "": the only one')
    splits: str = Field("", description='its splits to merge into one table, with commas between them; "": all')
    label: str = Field("", description='its column of classes; "": the only one that is declared as such, or is named so')
    inputs: str = Field(
        "", description='its column of images, or columns of numbers with commas; "": the images, else all numbers'
    )
    image_side: int = Field(0, ge=0, le=512, description="pixels that images are scaled to, each way; 0: they stay as they are")


class Hub(PartitionedDataset):
    """Images [channels, height, width] in -1..1, or numbers as they are; by default Dirichlet 0.1 over 20 users."""

    name = "hub"
    Options = HubOptions
    model = "auto"
    inner_lr = 0.03
    needs_files = True

    def __init__(self, options: HubOptions, data_dir: Path) -> None:
        if not options.name:
            raise DataError("the data set `hub` needs a name: use `--dataset hub:NAME`, such as hub:ylecun/mnist")
        by = options.partition or Partition(self.partition, self.users)
        splits = [split.strip() for split in options.splits.split(",") if split.strip()]
        self.table = hub.open_table(options.name, options.subset, splits, by.seed)
        label = _label(self.table, options)
        classes, labels = _classes(self.table, label)
        natural = by.scheme.column
        if natural:
            _require(self.table, natural, "`partition = natural:COLUMN`")
        self._inputs = _inputs(self.table, options, {label, natural})
        self._side, self._mode = options.image_side, ""
        rows = _users(self.table, by, labels)
        shape = self._read(next(iter(rows.values()))[:1]).shape[1:]

        def take(name: str, positions: Array) -> Array:
            found = self._read(rows[name][positions])
            if found.shape[1:] != shape:
                raise DataError(
                    f"the inputs of 'hub:{options.name}' must be of one shape, got {list(shape)} and {list(found.shape[1:])}: "
                    "set `hub.image-side`"
                )
            return found

        self.spread({name: labels[held] for name, held in rows.items()}, classes, tuple(shape), take, by)

    def _read(self, rows: Array) -> Array:
        """Return the inputs of these rows of the table: float32 [rows, ..]. Raises DataError."""
        found = self.table.select(rows)
        if len(self._inputs) == 1 and _type(found, self._inputs[0]) == "Image":
            return self._images(found[self._inputs[0]][:])
        try:
            columns = [np.array(found[name][:], dtype=np.float32).reshape(len(rows), -1) for name in self._inputs]
        except (TypeError, ValueError):
            raise DataError(
                "the inputs of a data set of the hub must be numbers, or lists of numbers of one length, in every row: name "
                "other columns with `hub.inputs`"
            ) from None
        numbers = np.concatenate(columns, axis=1)
        if not np.isfinite(numbers).all():
            raise DataError("the inputs of a data set of the hub must be numbers in every row, got an empty or infinite cell")
        return numbers

    def _images(self, pictures: Sequence[Any]) -> Array:
        if any(picture is None for picture in pictures):
            raise DataError(
                "the images of a data set of the hub must be there in every row, got an empty cell: leave such rows out"
            )
        self._mode = self._mode or ("L" if pictures[0].mode in ("L", "1", "I", "I;16", "F") else "RGB")
        size = (self._side, self._side) if self._side else None
        made = [picture.convert(self._mode) for picture in pictures]
        arrays = [np.asarray(picture.resize(size) if size else picture, dtype=np.float32) for picture in made]
        if len({array.shape for array in arrays}) > 1:
            raise DataError("the images must be of one size, got several: set `hub.image-side`")
        stacked = np.stack(arrays) / 255
        stacked = stacked[:, None] if stacked.ndim == 3 else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))
        return (stacked - 0.5) / 0.5


def _users(table: Any, by: Partition, labels: Array) -> dict[str, Array]:
    """Return the rows of every user by name, of rows that have a class."""
    if by.scheme.kind != "natural":
        drawn = partitioners.draw(by, labels, shuffled=True)
        return dict(zip(user_names(len(drawn)), drawn, strict=True))
    column, values = by.scheme.column, table[by.scheme.column][:]
    if any(isinstance(value, list | dict) for value in values):
        raise DataError(f"`partition = natural:COLUMN` must name a column of single values, got '{column}', which holds lists")
    known = np.array([row for row, value in enumerate(values) if value is not None and labels[row] >= 0], dtype=np.int64)
    if not len(known):
        raise DataError(f"no row of the data set has both a class and a value of '{column}': name other columns")
    return {name: known[rows] for name, rows in partitioners.users_by_name([values[row] for row in known]).items()}


def _type(table: Any, column: str) -> str:
    return type(table.features[column]).__name__


def _require(table: Any, column: str, setting: str) -> None:
    if column not in table.column_names:
        hint = did_you_mean(column, table.column_names) or f": it has {', '.join(table.column_names[:20])}"
        raise DataError(f"{setting} must name a column of the data set, got '{column}'{hint}")


def _label(table: Any, options: HubOptions) -> str:
    """Return the name of the column of classes. Raises DataError."""
    if options.label:
        _require(table, options.label, "`hub.label`")
        return options.label
    declared = [name for name in table.column_names if _type(table, name) == "ClassLabel"]
    found = declared if len(declared) == 1 else [name for name in _LABELS if name in (declared or table.column_names)]
    if not found:
        raise DataError(f"`hub.label` must name the column of classes, one of {', '.join(declared or table.column_names[:20])}")
    return found[0]


def _classes(table: Any, label: str) -> tuple[list[str], Array]:
    """Return the names of the classes, and the class of every row: int64, -1: it has none. Raises DataError."""
    values = table[label][:]
    if _type(table, label) == "ClassLabel":
        return list(table.features[label].names), np.array([-1 if value is None else value for value in values], dtype=np.int64)
    held = {value for value in values if isinstance(value, str | int)}
    if len(held) > _MOST_CLASSES or not all(value is None or isinstance(value, str | int) for value in values):
        raise DataError(f"`hub.label` must name a column of classes, text or whole numbers, got '{label}'")
    names = sorted(held)
    places = {value: place for place, value in enumerate(names)}
    return [str(name) for name in names], np.array([places.get(value, -1) for value in values], dtype=np.int64)


def _inputs(table: Any, options: HubOptions, others: set[str]) -> list[str]:
    """Return the names of the columns to predict from: one of images, or several of numbers. Raises DataError."""
    named = [name.strip() for name in options.inputs.split(",") if name.strip()]
    for name in named:
        _require(table, name, "`hub.inputs`")
    rest = named or [name for name in table.column_names if name not in others]
    images = [name for name in rest if _type(table, name) == "Image"]
    found = images[:1] or [name for name in rest if _is_numeric(table.features[name])]
    if not found or (named and found != named):
        wrong = next((name for name in rest if name not in found), _nothing_else(others))
        raise DataError(
            f"`hub.inputs` must name a column of images or columns of numbers, got '{wrong}': for text, save the data as a "
            "file and use `--data` with `--partition`"
        )
    if images:
        needs("datasets", "PIL", "images of the hub", error=DataError, load=False)
    return found


def _nothing_else(others: set[str]) -> str:
    """Return what to name where there is no column but that of the classes."""
    return f"nothing beside {min(filter(None, others))}"


def _is_numeric(feature: Any) -> bool:
    """Whether a column holds numbers, or lists of them of one length."""
    inner = feature
    while hasattr(inner, "feature"):
        inner = inner.feature
    return (
        str(getattr(inner, "dtype", "")).startswith(("int", "uint", "float", "bool")) and type(feature).__name__ != "ClassLabel"
    )
