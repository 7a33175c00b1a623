"""A user's own data: one file whose rows belong to tasks (hospitals, patients), or one file for each node.

The rules are in docs/own-data.md. What must be equal on all nodes (names and kinds of columns, classes, encoding) is
`DataSpec.schema`; what is measured on examples (means, deviations) comes from a task's own support part alone.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from common.batch import Batch, TaskData
from common.datasets.base import SPLITS, DataSpec, FixedSplitDataset, TaskInfo, generator
from common.datasets.tables import PIXELS, Array, Table, as_numbers, read_table
from common.errors import DataError
from common.options import Options, Text

_MOST_CLASSES = 20
_PARTS = (0.4, 0.7)
"""Where the support and the query part of a task end, if `own.shots` is 0."""


class OwnOptions(Options):
    """Settings of the data set `own`."""

    path: str = Field("", description="the user's .npz, .csv, .parquet, .jsonl, folder of images, or module:function")
    task_column: str = Field("task", description="column that says which task a row belongs to")
    target_column: str = Field("", description='column to predict; "": `target`, `label`, `class` or `y`, whichever is there')
    split_column: str = Field("", description='column with train, validation or test, of rows or of whole tasks; "": none')
    features: str = Field("", description='columns to predict from, with commas between them; "": all others')
    kind: Literal["auto", "classification", "regression"] = Field("auto", description="auto: by the values of the target")
    classes: Text = Field("", description='class labels in order, with commas between them; "": those of the file, sorted')
    shots: int = Field(0, ge=0, description="support examples per class (regression: in all) of a task; 0: 40 % of its rows")
    categorical: str = Field(
        "", description="columns of categories even where these look like numbers, with commas between them"
    )
    category_width: int = Field(8, ge=2, le=1024, description="inputs that a text column becomes (hashed one-hot)")
    image_side: int = Field(28, ge=8, le=256, description="pixels that images are scaled to, each way")
    leave_out: str = Field("", description='this task alone is tested, all others train; "": split by seed')


class Own(FixedSplitDataset):
    """Tasks from a user's own table; standardised per task from its support part."""

    name = "own"
    Options = OwnOptions
    model = "auto"
    """The form of the inputs decides: images have conv4."""
    inner_lr = 0.03  # 0.1 diverges on standardised numbers

    def __init__(self, options: OwnOptions, data_dir: Path) -> None:
        if not options.path:
            raise DataError("the data set `own` needs a file: use `--data PATH`, or set `own.path` or the node's `data-path`")
        self.table = read_table(options.path, options.image_side)
        self._options = options
        self._target = _pick_target(self.table, options)
        for column in filter(None, (options.task_column, options.split_column)):
            _require(self.table, column, options.path)
        self._read_numbers()
        self.kind = _kind(self.table[self._target], options)
        self.classes = _classes(self.table[self._target], options) if self.kind == "classification" else []
        self._features = self._pick_features()
        self.left_out: dict[str, str] = {}
        self._splits: dict[str, str] = {}
        self._data = self._build()

    def _read_numbers(self) -> None:
        """Make numbers of text columns that hold nothing else, text of `own.categorical`; DataError for a mixture."""
        options, table = self._options, self.table
        categorical = _listed(options.categorical)
        for name in categorical:
            _require(table, name, options.path)
            table[name] = np.array(_as_text(table[name]), dtype=object)
        used = _listed(options.features) or list(table)
        for name in sorted(set(used) & set(table) - {self._target, options.task_column, options.split_column, *categorical}):
            table[name] = as_numbers(name, table[name], f"set `own.categorical={name}`")
        if options.kind != "classification" and self._target not in categorical:
            advice = "set `own.kind=classification`" if options.kind == "auto" else "leave the row out"
            table[self._target] = as_numbers(self._target, table[self._target], advice)

    def _pick_features(self) -> list[str]:
        options = self._options
        reserved = {self._target, options.task_column, options.split_column}
        names = _listed(options.features) or sorted(set(self.table) - reserved)
        for name in names:
            _require(self.table, name, options.path)
        if clash := reserved & set(names):
            raise DataError(f"`own.features` must not name the target, task or split column, got `{min(clash)}`")
        if not names:
            raise DataError(f"the data '{options.path}' have no column to predict from beside the target and the task")
        if PIXELS in names and names != [PIXELS]:
            raise DataError("images cannot be mixed with other columns: set `own.features=pixels`")
        for name in names:
            column = self.table[name]
            if column.dtype != object and np.isinf(column).any():
                raise DataError(f"the column `{name}` holds infinite values: remove them or leave them empty")
        return names

    @property
    def spec(self) -> DataSpec:
        images = self._features == [PIXELS]
        shape = tuple(self.table[PIXELS].shape[1:]) if images else (sum(self._width(name) for name in self._features),)
        kinds = [[name, "text" if self.table[name].dtype == object else "number"] for name in self._features]
        facts = {
            "target": self._target,
            "classes": self.classes,
            "features": kinds,
            "category-width": self._options.category_width,
        }
        return DataSpec(self.kind, shape, len(self.classes) or 1, schema=json.dumps(facts, sort_keys=True))

    def tasks(self) -> list[TaskInfo]:
        infos = super().tasks()
        return [TaskInfo(i.task_id, i.num_support, i.num_query, i.num_test, split=self._splits[i.task_id]) for i in infos]

    def _width(self, name: str) -> int:
        return self._options.category_width if self.table[name].dtype == object else 1

    def _build(self) -> dict[str, TaskData]:
        options, names = self._options, _as_text(self.table[self._options.task_column])
        found = [name for name in dict.fromkeys(names) if name is not None]
        if options.leave_out and options.leave_out not in found:
            raise DataError(f"`own.leave-out` must be one of the tasks {', '.join(found[:10])}, got '{options.leave_out}'")
        data: dict[str, TaskData] = {}
        for name in sorted(found):
            rows = np.flatnonzero([value == name for value in names])
            reason = self._add(data, name, rows)
            if reason:
                self.left_out[name] = reason
        if not data:
            first = next(iter(self.left_out.items()), ("", "no row names a task"))
            raise DataError(f"no task of '{options.path}' can be used: task '{first[0]}': {first[1]}")
        return data

    def _add(self, data: dict[str, TaskData], name: str, rows: Array) -> str:
        """Put the task among `data`; returns why that cannot be, in words, or nothing."""
        y = self._labels(rows)
        known = ~np.isnan(y)
        rows, y = rows[known], y[known]
        forced, self._splits[name] = self._published(rows)
        if self._options.leave_out:
            self._splits[name] = "test" if name == self._options.leave_out else "train"
        parts = self._cut(name, y, forced)
        if isinstance(parts, str):
            return parts
        x, y = self._encode(rows, parts[0]), self._scaled(y, parts[0])
        data[name] = TaskData(*(_batch(x[part], y[part], self.kind) for part in parts))
        return ""

    def _labels(self, rows: Array) -> Array:
        """The target as class positions or numbers; NaN where it is missing: such rows are not used."""
        column = self.table[self._target][rows]
        if self.kind == "regression":
            return np.asarray(column, dtype=np.float64)
        position = {label: float(i) for i, label in enumerate(self.classes)}
        return np.array([np.nan if label is None else position[label] for label in _as_text(column)])

    def _published(self, rows: Array) -> tuple[Array, str]:
        """Which rows are test rows, and the split of the whole task: it has one if all its rows say the same."""
        nothing = np.zeros(len(rows), dtype=bool)
        if not self._options.split_column:
            return nothing, ""
        said = _as_text(self.table[self._options.split_column][rows])
        if wrong := sorted({str(value) for value in said} - set(SPLITS)):
            raise DataError(f"the column `{self._options.split_column}` must hold train, validation or test, got '{wrong[0]}'")
        if len(set(said)) == 1:
            return nothing, str(said[0])
        return np.array([value == "test" for value in said]), ""

    def _cut(self, name: str, y: Array, forced: Array) -> list[Array] | str:
        """Positions of support, query and test; a reason if the task has too few rows."""
        rng = generator(0, "own", name)
        strata = y if self.kind == "classification" else np.zeros(len(y))
        shots = self._options.shots
        if shots and self.kind == "classification" and len(set(y)) < len(self.classes):
            return f"it has examples of {len(set(y))} of {len(self.classes)} classes, `own.shots` needs {shots} + 2 of each"
        parts: list[list[int]] = [[], [], []]
        for stratum in np.unique(strata):
            order = rng.permutation(np.flatnonzero((strata == stratum) & ~forced)).tolist()
            has_test = bool(forced.any())
            first = shots or max(1, round(_PARTS[0] * len(order)))
            second = (
                len(order) if has_test else (first + (len(order) - first + 1) // 2 if shots else round(_PARTS[1] * len(order)))
            )
            if shots and len(order) < shots + (1 if has_test else 2):
                return f"it has {len(order)} rows of a class, `own.shots` needs {shots} for support and others to test"
            second = max(first + 1, second)
            for part, chosen in zip(parts, (order[:first], order[first:second], order[second:]), strict=True):
                part += chosen
        parts[2] += np.flatnonzero(forced).tolist()
        if not all(parts):
            count = f"{len(y)} row{'s' * (len(y) != 1)}"
            return f"it has {count} with a target, too few for support, query and test: 3 of a class are the least"
        return [np.array(sorted(part)) for part in parts]

    def _encode(self, rows: Array, support: Array) -> Array:
        if self._features == [PIXELS]:
            pixels = self.table[PIXELS][rows]
            return (pixels / 255 if self.table[PIXELS].max() > 1 else pixels).astype(np.float32)
        blocks = []
        for name in self._features:
            column = self.table[name][rows]
            if column.dtype == object:
                blocks.append(hashed(name, column, self._options.category_width))
            else:
                # A missing value becomes the support's mean, which is 0 after standardisation.
                blocks.append(np.nan_to_num(_standardised(column, support))[:, None])
        return np.concatenate(blocks, axis=1).astype(np.float32)

    def _scaled(self, y: Array, support: Array) -> Array:
        return y if self.kind == "classification" else _standardised(y, support)


def hashed(name: str, column: Array, width: int) -> Array:
    """One-hot [rows, width] of a text column by the hash of its values: the same on every node; missing is all zeros."""
    result = np.zeros((len(column), width))
    for row, value in enumerate(column):
        if value is not None:
            digest = hashlib.blake2b(f"{name}\x1f{value}".encode(), digest_size=8).digest()
            result[row, int.from_bytes(digest, "big") % width] = 1.0
    return result


def _standardised(column: Array, support: Array) -> Array:
    known = column[support][~np.isnan(column[support])]
    mean = known.mean() if len(known) else 0.0
    deviation = known.std() if len(known) else 0.0
    # Clipped: a column that hardly varies in a small support would blow up elsewhere.
    return np.clip((column - mean) / (deviation if deviation > 1e-12 else 1.0), -10, 10)


def _batch(x: Array, y: Array, kind: str) -> Batch:
    labels = (
        torch.from_numpy(y.astype(np.int64)) if kind == "classification" else torch.from_numpy(y.astype(np.float32))[:, None]
    )
    return Batch.of(torch.from_numpy(x), labels)


def _listed(setting: str) -> list[str]:
    """The names in a setting, with commas between them."""
    return [name.strip() for name in setting.split(",")] if setting else []


def _pick_target(table: Table, options: OwnOptions) -> str:
    if options.target_column:
        _require(table, options.target_column, options.path)
        return options.target_column
    for name in ("target", "label", "class", "y"):
        if name in table:
            return name
    raise DataError(
        f"which column of '{options.path}' is to be predicted is not said: use `--target`, one of {', '.join(table)}"
    )


def _require(table: Table, column: str, path: str) -> None:
    if column not in table:
        raise DataError(f"the data '{path}' have no column `{column}`: they have {', '.join(list(table)[:20])}")


def _kind(target: Array, options: OwnOptions) -> Literal["classification", "regression"]:
    if target.ndim != 1:
        raise DataError("the target must be one column, got images")
    text = target.dtype == object
    if not text and np.isinf(target).any():
        raise DataError("the target holds infinite values: remove them or leave them empty")
    if options.kind == "regression" and text:
        example = next((value for value in target if value is not None), None)
        raise DataError(f"the target must hold numbers for regression, got the text '{example}'")
    if options.kind != "auto":
        return options.kind
    known = target if text else target[~np.isnan(target)]
    whole = not text and bool((known == np.round(known)).all())
    return "classification" if text or (whole and len(np.unique(known)) <= _MOST_CLASSES) else "regression"


def _classes(target: Array, options: OwnOptions) -> list[str]:
    labels = {label for label in _as_text(target) if label is not None}
    if options.classes:
        listed = _listed(options.classes)
        if extra := sorted(labels - set(listed)):
            raise DataError(
                f"`own.classes` must name every class of the data, '{extra[0]}' is missing from {options.classes!r}"
            )
    else:
        listed = sorted(labels, key=lambda label: (_number(label), label))
    if len(listed) < 2:
        raise DataError(f"the target must have at least two classes, got {len(listed)}: check `--target`")
    return listed


def _number(label: str) -> float:
    try:
        return float(label)
    except ValueError:
        return float("inf")


def _as_text(column: Array) -> list[str | None]:
    if column.ndim != 1:
        raise DataError("tasks, targets and splits must be columns, got images")
    if column.dtype == object:
        return [None if value is None else str(value) for value in column]
    return [None if np.isnan(value) else f"{value:.15g}" for value in column]
