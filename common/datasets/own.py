"""A user's own data: one file whose rows belong to tasks (hospitals, patients), or one file for each node.

The rules are in docs/own-data.md. What must be equal on all nodes (names and kinds of columns, classes, encoding) is
`DataSpec.schema`; what is measured on examples (means, deviations) comes from a task's own support part alone.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from common.batch import Batch, TaskData
from common.datasets.base import SPLITS, DataSpec, FixedSplitDataset, TaskInfo, generator, left_out_in_words
from common.datasets.preparation import Preparation, measure
from common.datasets.tables import PIXELS, Array, Table, as_numbers, read_table
from common.errors import DataError, as_told, did_you_mean
from common.options import Options, Text
from common.printable import flawed
from common.units import counted

_MOST_CLASSES = 20
_LARGEST = 1e30
"""Of the numbers in a column."""
_MOST_TOLD = 5
_FEW = 10
"""Rows of a class that may be a slip."""
_PARTS = (0.4, 0.7)
"""Where the support and the query part of a task end, if `own.shots` is 0."""


class OwnOptions(Options):
    """Settings of the data set `own`."""

    path: str = Field("", description="the user's .npz, .csv, .parquet, .jsonl, folder of images, or module:function")
    task_column: str = Field("task", description="column that says which task a row belongs to")
    task_name: str = Field(
        "", description='where the file has no task column, all its rows are one task of this name; "": it is refused'
    )
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

    def __init__(self, options: OwnOptions, data_dir: Path, schema: str = "") -> None:
        """`schema`: what other nodes agreed on (`DataSpec.schema`), which this file then must fit; "": the file decides."""
        if not options.path:
            raise DataError("the data set `own` needs a file: use `--data PATH`, or set `own.path` or the node's `data-path`")
        self.table = read_table(options.path, options.image_side)
        self.one_task = bool(options.task_name) and options.task_column not in self.table
        if self.one_task:
            _refuse_nearly(self.table, options.task_column, options.path)
            rows = len(next(iter(self.table.values())))
            self.table[options.task_column] = np.full(rows, options.task_name, dtype=object)
        self._agreed: dict[str, Any] = json.loads(schema) if schema else {}
        if self._agreed and options.split_column not in self.table:  # of the others' files
            options = options.model_copy(update={"split_column": ""})
        self.options = options
        self._target = options.target_column or self._agreed.get("target") or _pick_target(self.table, options)
        _require_tasks(self.table, options)
        for column in filter(None, (self._target, options.split_column)):
            _require(self.table, column, options.path)
        if self._target == options.task_column:
            raise DataError(f"`--task` and `--target` must be two columns, got '{self._target}' for both")
        self._width = int(self._agreed.get("category-width", options.category_width))
        self._read_numbers()
        self.kind = _kind(self.table[self._target], options)
        if self._agreed:
            self.kind = "classification" if self._agreed["classes"] else "regression"
        classification, agreed = self.kind == "classification", self._agreed.get("classes", [])
        self.classes = _classes(self.table[self._target], options, agreed) if classification else []
        self._features = self._pick_features()
        self.left_out: dict[str, str] = {}
        self._splits: dict[str, str] = {}
        self._preparations: dict[str, Preparation] = {}
        self.rows: dict[str, list[Array]] = {}
        """The rows of every task's support, query and test part, counted from 0 in the file."""
        self._data = self._build()
        self.remarks = _remarks(as_text(self.table[self._target]), self.classes, options.path) if classification else []
        if len(self.left_out) > len(self._data):
            self.remarks.append(
                f"{len(self.left_out)} of {len(self.left_out) + len(self._data)} tasks of '{options.path}' cannot be used: is "
                f"`{options.task_column}` the column that says whose row it is (`--task`)?"
            )

    def _read_numbers(self) -> None:
        """Make numbers of text columns that hold nothing else, text of `own.categorical`; DataError for a mixture."""
        options, table = self.options, self.table
        agreed: dict[str, str] = dict(self._agreed.get("features", []))
        categorical = _listed(options.categorical) + [name for name, kind in agreed.items() if kind == "text"]
        used = list(agreed) or _listed(options.features) or list(table)
        fit(table, {**dict.fromkeys(used, ""), **agreed, **dict.fromkeys(categorical, "text")}, self._reserved, options.path)
        if options.kind != "classification" and self._target not in categorical and not self._agreed.get("classes"):
            advice = "ask for classes with `--set own.kind=classification`" if options.kind == "auto" else "leave the row out"
            target = table[self._target] = as_numbers(self._target, table[self._target], advice)
            if self._agreed and target.dtype == object:
                if any(value is not None for value in target):
                    raise DataError(f"the target `{self._target}` of '{options.path}' must hold numbers, as it did in training")
                table[self._target] = np.full(len(target), np.nan)

    @property
    def _reserved(self) -> set[str]:
        """Columns that nothing is predicted from."""
        return {self._target, self.options.task_column, self.options.split_column}

    def _pick_features(self) -> list[str]:
        options, reserved = self.options, self._reserved
        agreed = [name for name, _ in self._agreed.get("features", [])]
        names = agreed or _listed(options.features) or sorted(set(self.table) - reserved)
        for name in names:
            _require(self.table, name, options.path, typed=not agreed)
        if clash := reserved & set(names):
            raise DataError(f"`own.features` must not name the target, task or split column, got `{min(clash)}`")
        if not names:
            raise DataError(f"the data '{options.path}' have no column to predict from beside the target and the task")
        if PIXELS in names and names != [PIXELS]:
            raise DataError("images cannot be mixed with other columns: set `own.features=pixels`")
        refuse_infinite(self.table, names)
        return names

    @property
    def spec(self) -> DataSpec:
        images = self._features == [PIXELS]
        shape = tuple(self.table[PIXELS].shape[1:]) if images else (sum(self._inputs(name) for name in self._features),)
        kinds = [[name, "text" if self.table[name].dtype == object else "number"] for name in self._features]
        facts = {
            "target": self._target,
            "classes": self.classes,
            "features": kinds,
            "category-width": self._width,
        }
        return DataSpec(self.kind, shape, len(self.classes) or 1, schema=json.dumps(facts, sort_keys=True))

    def tasks(self) -> list[TaskInfo]:
        infos = super().tasks()
        return [TaskInfo(i.task_id, i.num_support, i.num_query, i.num_test, split=self._splits[i.task_id]) for i in infos]

    def preparation(self, task_id: str) -> Mapping[str, Any]:
        return self._preparations[task_id].to_json()

    def _inputs(self, name: str) -> int:
        return self._width if self.table[name].dtype == object else 1

    def _build(self) -> dict[str, TaskData]:
        options, names = self.options, as_text(self.table[self.options.task_column])
        found = [name for name in dict.fromkeys(names) if name is not None]
        if options.leave_out and options.leave_out not in found:
            raise DataError(f"`own.leave-out` must be one of the tasks {', '.join(found[:10])}, got '{options.leave_out}'")
        if wrong := flawed(found):
            raise DataError(
                f"the column `{options.task_column}` of '{options.path}' names a task '{wrong[0]}', which cannot be used: "
                f"{wrong[1]}",
                wrong[0],
            )
        data: dict[str, TaskData] = {}
        for name in sorted(found):
            rows = np.flatnonzero([value == name for value in names])
            reason = self._add(data, name, rows)
            if reason:
                self.left_out[name] = reason
        if not data:
            why = left_out_in_words(self.left_out) if self.left_out else "no row names one"
            many = f"; is `{options.task_column}` the column that says whose row it is (`--task`)?" if len(found) > 1 else ""
            raise DataError(f"no task of '{options.path}' can be used: {why}{many}")
        return data

    def _add(self, data: dict[str, TaskData], name: str, rows: Array) -> str:
        """Put the task among `data`; returns why that cannot be, in words, or nothing."""
        y = self._labels(rows)
        known = ~np.isnan(y)
        rows, y = rows[known], y[known]
        forced, self._splits[name] = self._published(rows)
        if self.options.leave_out:
            self._splits[name] = "test" if name == self.options.leave_out else "train"
        parts = self._cut(name, y, forced)
        if isinstance(parts, str):
            return parts
        table = {column: self.table[column][rows] for column in self._features}
        numbers = y if self.kind == "regression" else None
        preparation = measure(table, self._features, parts[0], self._width, numbers)
        if preparation.images:
            preparation = replace(preparation, brightest=255.0 if self.table[PIXELS].max() > 1 else 1.0)
        x, y = preparation.encode(table), preparation.target.apply(y) if preparation.target else y
        data[name] = TaskData(*(_batch(x[part], y[part], self.kind) for part in parts))
        self._preparations[name], self.rows[name] = preparation, [rows[part] for part in parts]
        return ""

    def _labels(self, rows: Array) -> Array:
        """The target as class positions or numbers; NaN where it is missing: such rows are not used."""
        column = self.table[self._target][rows]
        if self.kind == "regression":
            return np.asarray(column, dtype=np.float64)
        position = {label: float(i) for i, label in enumerate(self.classes)}
        return np.array([np.nan if label is None else position[label] for label in as_text(column)])

    def _published(self, rows: Array) -> tuple[Array, str]:
        """Which rows are test rows, and the split of the whole task: it has one if all its rows say the same."""
        nothing = np.zeros(len(rows), dtype=bool)
        if not self.options.split_column:
            return nothing, ""
        said = as_text(self.table[self.options.split_column][rows])
        if wrong := sorted({str(value) for value in said} - set(SPLITS)):
            got = f"'{wrong[0]}'"
            raise DataError(f"the column `{self.options.split_column}` must hold train, validation or test, got {got}", got)
        if len(set(said)) == 1:
            return nothing, str(said[0])
        return np.array([value == "test" for value in said]), ""

    def _cut(self, name: str, y: Array, forced: Array) -> list[Array] | str:
        """Positions of support, query and test; a reason if the task has too few rows."""
        rng = generator(0, "own", name)
        strata = y if self.kind == "classification" else np.zeros(len(y))
        shots = self.options.shots
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
            rows = counted(len(y), "row")
            return f"it has {rows} with a target, too few for support, query and test: 3 of a class are the least"
        return [np.array(sorted(part)) for part in parts]


def task_of_file(path: str) -> str:
    """What all rows of a file without a task column are called, if nobody has said: "/data/ward-7.csv" is "ward-7"."""
    file = Path(path).expanduser().absolute()
    return path if ":" in path and not file.exists() else file.stem  # "my_module:function" may not be "my_module"


def _refuse_nearly(table: Table, column: str, path: str) -> None:
    """Raise DataError if a column is called `column` but for case, blanks or underscores: it would become an input."""

    def plain(name: str) -> str:
        return re.sub(r"[\s_-]", "", name.casefold())

    for name in table:
        if plain(name) == plain(column):
            raise DataError(
                f"the data '{path}' have no column `{column}`, but `{name}`: rename it, or name it as the task column"
            )


def fit(table: Table, kinds: Mapping[str, str], reserved: set[str], path: str) -> None:
    """Make the columns that `kinds` names text ("text") or numbers ("number"), or numbers where they are ("").

    Columns of `reserved` stay as they are unless they are to be text. Raises DataError for words among numbers.
    """
    for name, kind in sorted(kinds.items()):
        if kind:
            _require(table, name, path, typed=False)
        if kind == "text":
            table[name] = np.array(as_text(table[name]), dtype=object)
        elif name in table and name not in reserved:
            # What the others agreed on cannot be declared otherwise here.
            advice = "leave the row out" if kind else f"declare categories with `--set own.categorical={name}`"
            table[name] = as_numbers(name, table[name], advice)
            if kind == "number" and table[name].dtype == object and any(value is not None for value in table[name]):
                raise DataError(f"the column `{name}` of '{path}' must hold numbers, as it did in training, got text")
            if kind == "number" and table[name].dtype == object:
                table[name] = np.full(len(table[name]), np.nan)


def refuse_infinite(table: Table, names: list[str]) -> None:
    """Raise DataError if one of these columns holds infinity, or numbers whose squares would become that."""
    for name in names:
        if table[name].dtype == object:
            continue
        if np.isinf(table[name]).any():
            raise DataError(f"the column `{name}` holds infinite values: remove them or leave them empty")
        if (np.abs(table[name]) > _LARGEST).any():
            raise DataError(f"the column `{name}` holds numbers beyond {_LARGEST:g}: give it in a larger unit")


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


def _require(table: Table, column: str, path: str, *, typed: bool = True) -> None:
    """Raise DataError unless the column is there. `typed`: a person has named it, and may have misspelled it."""
    if column not in table:
        hint = (did_you_mean(column, table) if typed else "") or f": they have {', '.join(list(table)[:20])}"
        raise DataError(f"the data '{path}' have no column `{column}`{hint}")


def _require_tasks(table: Table, options: OwnOptions) -> None:
    """Raise DataError unless the column is there that says whose a row is."""
    default = OwnOptions().task_column
    if options.task_column == default and default not in table:
        raise DataError(
            f"which column of '{options.path}' says whose row it is (a patient, a hospital) is not said: use `--task`, one of "
            f"{', '.join(list(table)[:20])}"
        )
    _require(table, options.task_column, options.path)


def _kind(target: Array, options: OwnOptions) -> Literal["classification", "regression"]:
    if target.ndim != 1:
        raise DataError("the target must be one column, got images")
    text = target.dtype == object
    if not text and np.isinf(target).any():
        raise DataError("the target holds infinite values: remove them or leave them empty")
    if not text and options.kind != "classification" and (np.abs(target) > _LARGEST).any():
        raise DataError(f"the target holds numbers beyond {_LARGEST:g}: give it in a larger unit")
    if options.kind == "regression" and text:
        example = f"'{next((value for value in target if value is not None), None)}'"
        raise DataError(f"the target must hold numbers for regression, got the text {example}", example)
    if options.kind != "auto":
        return options.kind
    known = target if text else target[~np.isnan(target)]
    whole = not text and bool((known == np.round(known)).all())
    return "classification" if text or (whole and len(np.unique(known)) <= _MOST_CLASSES) else "regression"


def _classes(target: Array, options: OwnOptions, agreed: list[str]) -> list[str]:
    labels = {label for label in as_text(target) if label is not None}
    if agreed or options.classes:
        listed = agreed or _listed(options.classes)
        if extra := sorted(labels - set(listed)):
            raise DataError(
                f"`own.classes` must name every class of the data, '{extra[0]}' is missing from {','.join(listed)!r}"
            )
    else:
        listed = sorted(labels, key=lambda label: (_number(label), label))
    if len(listed) < 2:
        raise DataError(f"the target must have at least two classes, got {len(listed)}: check `--target`")
    return listed


def _remarks(labels: list[str | None], classes: list[str], path: str) -> list[str]:
    """Sentences on classes that may be misspellings of others: alike but for case and blanks, or hardly ever there."""
    alike: dict[str, list[str]] = {}
    for label in classes:
        alike.setdefault("".join(label.casefold().split()), []).append(label)
    same = [" and ".join(map(_quoted, group[:_MOST_TOLD])) for group in alike.values() if len(group) > 1]
    counts = Counter(label for label in labels if label is not None)
    least = min(_FEW, counts.total() / len(classes) / 10)
    rare = [f"{_quoted(label)} ({counts[label]})" for label in classes if 0 < counts[label] < least]
    said = []
    if same:
        said.append(
            f"classes of '{path}' differ in case or blanks alone, {_some(same)}: if they are one class, give them one spelling"
        )
    if rare:
        said.append(
            f"classes of '{path}' have few of its {counts.total()} rows, {_some(rare)}: mend what is a slip, for every class "
            "is an output of the model"
        )
    return said


def _quoted(label: str) -> str:
    return f"'{as_told(label, 60)}'"


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _MOST_TOLD} more" if len(items) > _MOST_TOLD else ""
    return "; ".join(items[:_MOST_TOLD]) + more


def _number(label: str) -> float:
    try:
        return float(label)
    except ValueError:
        return float("inf")


def as_text(column: Array) -> list[str | None]:
    """The values as text, None where missing; whole numbers without a point."""
    if column.ndim != 1:
        raise DataError("tasks, targets and splits must be columns, got images")
    if column.dtype == object:
        return [None if value is None else str(value) for value in column]
    return [None if np.isnan(value) else f"{value:.15g}" for value in column]
