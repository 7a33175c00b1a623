"""Rows of a file as a personal model sees them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.columns import Inputs, Schema, make_inputs, usable
from quickbloom.common.datasets.own.dataset import reading_of
from quickbloom.common.datasets.own.files.image_arrays import choose_images, require_same_scale
from quickbloom.common.datasets.own.files.parquet_file import Unusable
from quickbloom.common.datasets.own.files.pictures import Pictures
from quickbloom.common.datasets.own.files.tables import PIXELS, Table, read_table
from quickbloom.common.datasets.own.preparation import Preparation
from quickbloom.common.datasets.own.target import UnknownClassError, read_target
from quickbloom.common.datasets.own.text import Array, Text, as_text, names
from quickbloom.common.errors import DataError
from quickbloom.common.maths.batch import Batch
from quickbloom.common.personal.model import Personal, digest


@dataclass(frozen=True)
class Rows:
    """Rows of a file that belong to one model.

    `at`: their positions in the file, from 0; `inputs`: the columns that they are made from; `x` [n, ...]: the inputs of the
    model; `y`: class positions or standardised numbers, NaN if unknown; `texts`: the same as the file has it.
    `parts`: "support", "query" or "test" by position, if the model was adapted to this very file.
    """

    model: Personal
    table: Table
    at: Array
    inputs: Inputs
    x: Tensor
    y: Array
    texts: list[str]
    parts: dict[int, str]

    @property
    def part_of_each(self) -> list[str]:
        """The part of every row, "" for none."""
        return [self.parts.get(int(row), "") for row in self.at]

    def labelled(self, chosen: Array) -> Batch:
        """Return those of the rows, bool [n], which have a target, as the model is scored on them."""
        y = self.y[chosen]
        labels = torch.from_numpy(y.astype(np.int64)) if self.model.classes else torch.from_numpy(y.astype(np.float32))[:, None]
        return Batch.of(self.x[torch.from_numpy(chosen)], labels)


class Source:
    """A file to predict, for one model. Reading it may raise DataError."""

    def __init__(self, path: str, options: OwnOptions, schema: Schema) -> None:
        self.table = read_table(path, 0 if schema.encoder else options.image_side)
        choose_images(self.table, options.features, schema.features)

    @cached_property
    def cells(self) -> Mapping[str, list[str]]:
        """The cells of the file's own columns as text, without pixels and what cannot be used."""
        found = {"file": list(self.table.files)} if self.table.files else {}
        for name, column in self.table.items():
            if not isinstance(column, Unusable | Pictures) and column.ndim == 1:
                text = column if isinstance(column, Text) else as_text(column)
                found[name] = [cell or "" for cell in text.cells()]
        return found


class Sources:
    """A file that is read once for all models that read it alike."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._read: dict[tuple[Any, ...], Source] = {}

    @property
    def first(self) -> Source:
        """The file as the first model reads it."""
        return next(iter(self._read.values()))

    def of(self, model: Personal) -> Source:
        """Return the file as `model` reads it. Raises DataError."""
        options = model.own_options
        key = (options.image_side, options.features, tuple(model.schema.features), bool(model.schema.encoder))
        if key not in self._read:
            self._read[key] = Source(self._path, options, model.schema)
        return self._read[key]


def rows_of(model: Personal, table: Table, *, alone: bool) -> Rows | None:
    """Return the rows of the model's task, or None if there are none. `alone`: there is no other model. Raises DataError."""
    card = model.card
    options, preparation = model.own_options.model_copy(update={"path": table.path}), model.preparation
    at = _positions(model.task, table, options, alone=alone)
    if not len(at):
        return None
    inputs = make_inputs(table, model.schema, reading_of(options), at)
    if isinstance(pixels := inputs.get(PIXELS), np.ndarray) and preparation.images:
        require_same_scale(pixels, preparation.brightest, table.path)
    x = torch.from_numpy(preparation.encode(inputs))
    if list(x.shape[1:]) != list(card["spec"][1]):
        raise DataError(
            f"the inputs of '{table.path}' have the shape {tuple(x.shape[1:])}, the model needs {tuple(card['spec'][1])}"
        )
    y, texts = _targets(table, model.schema, preparation, at, options)
    return Rows(model, table, at, inputs, x, y, texts, _parts(model, options))


def _positions(task: str, table: Table, options: OwnOptions, *, alone: bool) -> Array:
    """Return the positions of the task's rows; all rows if there is no task column and only one model."""
    if options.task_column not in table:
        if not alone:
            raise DataError(
                f"the data '{table.path}' have no column `{options.task_column}`, which says whose row it is: name the model "
                "of one task"
            )
        return np.arange(table.rows)
    tasks = names(usable(table, options.task_column), reading_of(options).extra_missing)
    return np.flatnonzero(tasks.codes == tasks.values.index(task)) if task in tasks.values else np.array([], dtype=np.int64)


def _targets(
    table: Table, schema: Schema, preparation: Preparation, rows: Array, options: OwnOptions
) -> tuple[Array, list[str]]:
    """Return (class positions or standardised numbers, NaN if unknown; the same as text) of the rows."""
    if schema.target not in table:
        return np.full(len(rows), np.nan), [""] * len(rows)
    try:
        found = read_target(table, schema.target, options, reading_of(options), schema, rows)
    except UnknownClassError as error:
        raise DataError(
            f"the column `{schema.target}` of '{table.path}' holds the class '{error.label}', the model knows "
            f"{', '.join(schema.classes)}: mend it, or leave the column out to predict without scores",
            error.label,
        ) from None
    texts = ["" if text is None else text for text in as_text(usable(table, schema.target)).take(rows).cells()]
    values = found.values
    return preparation.target.apply(values) if preparation.target else values, texts


def _parts(model: Personal, options: OwnOptions) -> dict[int, str]:
    """Return the part of every row if the model was adapted to this file; {} for any other file."""
    card = model.card
    try:
        own = Own.with_new_classes(options, card["schema"], whole=bool(card["adapted"].get("whole")))
        own = own.of_classes(model.classes) if len(own.classes) > len(model.classes) else own
        if model.task not in own.rows or digest(own.test_draws(model.task)[0]) != card["data"]:
            return {}
    except DataError:  # another file, for example one without targets
        return {}
    return own.part_of_rows(model.task)
