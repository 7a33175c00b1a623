"""A user's own data: one file whose rows belong to tasks (hospitals, patients), or one file for each node.

The rules are in docs/own-data.md. Everything that must be equal on all nodes (names and kinds of
columns, classes, categories) is in `DataSpec.schema`, with the means and deviations by which all
tasks are standardised. With `own.scale = "task"` these come from each task's own support part alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quickbloom.common.datasets import row_order
from quickbloom.common.datasets.base import DataSpec, FixedSplitDataset, Pool, TaskInfo, all_to_support, left_out_in_words
from quickbloom.common.datasets.holdings import Holdings
from quickbloom.common.datasets.own import remarks, simulated
from quickbloom.common.datasets.own.columns import (
    EMPTY,
    NUMBER,
    TEXT,
    Inputs,
    Reading,
    Schema,
    categories,
    find_encoder,
    find_kind,
    keys_of_each,
    make_inputs,
    make_vocabulary,
    read_time,
    require,
    usable,
)
from quickbloom.common.datasets.own.encoded import (
    FEATURES,
    TOKENS,
    Encoded,
    Tokens,
    clipped,
    encode_views,
    facts_of,
    most_norm,
    parts,
    token_facts,
)
from quickbloom.common.datasets.own.files.image_arrays import NO_SCALE, choose_images, is_beyond_white, white_of
from quickbloom.common.datasets.own.files.tables import PIXELS, Table, read_table
from quickbloom.common.datasets.own.options import OwnOptions, listed, quoted
from quickbloom.common.datasets.own.parts import Cutting, read_splits
from quickbloom.common.datasets.own.preparation import Preparation, Scale, measure
from quickbloom.common.datasets.own.scales import TARGET, Moments
from quickbloom.common.datasets.own.target import UnknownClassError, is_quantity, pick_target, read_target
from quickbloom.common.datasets.own.text import Array, Text, names
from quickbloom.common.datasets.own.vocabulary import Places
from quickbloom.common.datasets.partitioned import OnDemand
from quickbloom.common.errors import DataError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.printable import flawed


class Own(FixedSplitDataset):
    """Tasks from a user's own table; inputs are standardised per task by its support part."""

    name = "own"
    Options = OwnOptions
    algorithm = "ridge"  # the best of them on the tables of benchmarks/panel.py
    model = "auto"
    """The shape of the inputs decides: images get conv4."""
    inner_lr = 0.03  # 0.1 diverges on standardised numbers

    def __init__(self, options: OwnOptions, data_dir: Path, schema: str = "", *, whole: bool = False) -> None:
        """Read the file. Raises DataError.

        `schema`: what other nodes agreed on (`DataSpec.schema`), which this file must fit; "": the
        file decides. `whole`: nothing is held back for a score, so all rows with a target are support.
        """
        if not options.path:
            raise DataError("the data set `own` needs a file: use `--data PATH`, or set `own.path` or the node's `data-path`")
        options = options.cleaned()
        self.table = read_table(options.path, 0 if options.encoder else options.image_side)
        if options.partition is not None:
            options = simulated.prepare(self.table, options)
        self.one_task = bool(options.task_name) and options.task_column not in self.table
        if self.one_task:
            _refuse_nearly(self.table, options.task_column, options.path)
            self.table[options.task_column] = Text(np.zeros(self.table.rows, dtype=np.int64), [options.task_name])
        agreed = Schema.from_json(schema) if schema else None
        self._images = choose_images(self.table, options.features, agreed.features if agreed else ())
        """Name of the array that becomes `PIXELS` in the table."""
        if agreed and options.split_column not in self.table:  # the setting may be about other nodes' files
            options = options.model_copy(update={"split_column": ""})
        self.options = options
        self.whole = whole
        self._reading = reading_of(options)
        name = options.target_column or (agreed.target if agreed else "") or pick_target(self.table, options)
        _require_tasks(self.table, options)
        for column in filter(None, (name, options.split_column, options.time_column)):
            require(self.table, column, options.path)
        _require_different(options, name)
        self.target = read_target(self.table, name, options, self._reading, agreed)
        self.kind, self.classes = self.target.kind, self.target.classes
        if options.partition is not None:
            simulated.assign(self.table, options, self.target)
        # A node's own file may use another name for the target.
        self.schema = replace(agreed, target=name) if agreed else self._find_schema(name)
        self.inputs = make_inputs(self.table, self.schema, self._reading)
        self._tasks = names(usable(self.table, options.task_column), self._reading.extra_missing)
        self.times = read_time(self.table, self.schema, options, self._reading)
        """The moment of every row, by which its task is cut: float64 [rows], NaN: unknown; None: rows are drawn by content."""
        self.resample = self.times is None  # a query drawn anew would come before its support
        self.left_out: dict[str, str] = {}
        self._splits: dict[str, str] = {}
        self.beyond_white: list[str] = []
        """Tasks with pixels that had to be clipped."""
        self.rows: dict[str, list[Array]] = {}
        """Rows of every task's support, query and test part, counted from 0 in the file."""
        self.content = self._content_of_rows()
        """A hash of inputs and target of every row, by which rows are drawn: uint64 [rows]."""
        self._cut_tasks()
        self._begin_anew()
        if not whole:
            self._check_views()
        self.remarks = remarks.of(self)

    def _begin_anew(self) -> None:
        """Make the examples of every task at their next use."""
        self._data = OnDemand(self._task_data)
        self._training = OnDemand(self._training_pool)
        self._views = OnDemand(self._views_of)

    @classmethod
    def with_new_classes(cls, options: OwnOptions, schema: str, *, whole: bool) -> "Own":
        """Read a file that fits `schema` but for further classes of its target, which follow those of the schema.

        Raises DataError.
        """
        try:
            return cls(options, Path(), schema, whole=whole)
        except UnknownClassError as error:
            agreed = Schema.from_json(schema)
            if is_quantity(error.labels):
                raise DataError(
                    f"the target of '{options.path}' must hold classes, such as '{agreed.classes[0]}', as it did in training, "
                    f"got numbers such as '{error.label}': name the column with `--target`",
                    error.label,
                ) from None
            more = replace(agreed, classes=[*agreed.classes, *error.labels])
            return cls(options, Path(), more.to_json(), whole=whole)

    def of_classes(self, classes: list[str]) -> "Own":
        """Return the same rows with other classes, in this order. A row of another class has no target any more."""
        places = {self.classes.index(label): float(place) for place, label in enumerate(classes) if label in self.classes}
        found = copy(self)
        values = np.array([places.get(int(value), np.nan) if value == value else np.nan for value in self.target.values])
        found.target, found.classes = replace(self.target, classes=classes, values=values), classes
        found.schema = replace(self.schema, classes=classes)
        found.options = self.options.model_copy(update={"classes": quoted(classes) if self.options.classes else ""})
        found._begin_anew()
        return found

    def classes_of(self, task_id: str) -> list[str]:
        """Return the classes that the rows of a task have, in the order of all."""
        values = self.target.values[np.concatenate(self.rows[task_id])]
        return [self.classes[int(place)] for place in np.unique(values)]

    # ---- the file and its columns

    @property
    def _reserved(self) -> set[str]:
        """Columns that are not inputs."""
        return {self.options.task_column, self.options.split_column}

    def _find_schema(self, target: str) -> Schema:
        options, table = self.options, self.table
        features = self._pick_features(target)
        categorical = listed(options.categorical, table)
        for name in categorical:
            require(table, name, options.path)
        self._encoded_columns = self._columns_to_encode(features)
        kinds = {name: self._kind_of(name, categorical) for name in features}
        facts = self._facts(set(kinds.values()))
        made = {part: name for name, kind in kinds.items() if kind == FEATURES for part in parts(name, facts["size"])}
        if clash := sorted(kinds.keys() & made.keys()):
            raise DataError(f"the column `{clash[0]}` has the name of a feature of `{made[clash[0]]}`: rename it")
        texts = [name for name, kind in kinds.items() if kind == TEXT]
        least, most = options.vocabulary_min_count, keys_of_each(options.vocabulary_limit, len(texts))
        vocabularies = {name: make_vocabulary(table, name, self._reading, least, most) for name in texts}
        cycles = listed(options.cyclic, table)
        if wrong := [name for name in cycles if kinds.get(name, "date") not in ("date", "time", EMPTY)]:
            raise DataError(f"`own.cyclic` must name columns of dates or times, `{wrong[0]}` holds {kinds[wrong[0]]}s")
        return Schema(target, self.classes, kinds, vocabularies, [name for name in cycles if name in kinds], encoder=facts)

    def _kind_of(self, name: str, categorical: list[str]) -> str:
        if name in self._encoded_columns:
            return FEATURES if self.options.encoder else TOKENS
        if name == PIXELS:
            return NUMBER
        return TEXT if name in categorical else find_kind(self.table, name, self._reading)

    def _columns_to_encode(self, features: list[str]) -> list[str]:
        """Return the columns that the encoder reads: those of `own.text`, the pictures, or all numbers. Raises DataError."""
        options = self.options
        texts = listed(options.text, self.table)
        for name in texts:
            require(self.table, name, options.path)
        if texts and not options.encoder and not options.tokenizer:
            raise DataError(
                "`own.text` names columns of text, which need an encoder, such as `own.encoder=sentence:DIRECTORY`, or, for a "
                "model that reads text itself, `own.tokenizer=DIRECTORY`"
            )
        if options.tokenizer and (options.encoder or texts != features):
            raise DataError(
                "`own.tokenizer` is for a model that reads one column of text and nothing else: name it with `own.text` and "
                "with `own.features`, and no `own.encoder`"
            )
        if not options.encoder:
            return texts
        if texts:
            if foreign := [name for name in texts if name not in features]:
                raise DataError(f"`own.text` must name columns to predict from, got `{foreign[0]}`")
            return texts
        kind = find_encoder(self._reading).kind
        if kind == "text" and PIXELS in features:
            raise DataError(
                f"`own.encoder={options.encoder}` reads text, and these data are images: choose an encoder of images"
            )
        if kind == "text":
            raise DataError(
                f"`own.encoder={options.encoder}` reads text: name its column with `--text`, one of {', '.join(features[:20])}"
            )
        if kind == "images":
            if PIXELS not in features:
                raise DataError(f"`own.encoder={options.encoder}` reads images, and '{options.path}' holds none")
            return [PIXELS]
        numbers = [name for name in features if find_kind(self.table, name, self._reading) == NUMBER]
        if len(numbers) > 1 and not options.features:
            raise DataError(
                f"`own.encoder={options.encoder}` reads numbers in an order of its own: name the columns in that order with "
                f"`own.features`, such as {','.join(numbers[:20])}"
            )
        return numbers

    def _facts(self, kinds: set[str]) -> dict[str, Any]:
        """Return `Schema.encoder`."""
        if TOKENS in kinds:
            return token_facts(self.options.tokenizer, self.options.tokens)
        return facts_of(find_encoder(self._reading)) if FEATURES in kinds else {}

    def _pick_features(self, target: str) -> list[str]:
        options, reserved = self.options, self._reserved | {target}
        named = [PIXELS if name == self._images else name for name in listed(options.features, [*self.table, self._images])]
        found = named or sorted(set(self.table) - reserved)
        for name in found:
            require(self.table, name, options.path)
        if clash := reserved & set(found):
            raise DataError(f"`own.features` must not name the target, task or split column, got `{min(clash)}`")
        if not found:
            raise DataError(f"the data '{options.path}' have no column to predict from beside the target and the task")
        if PIXELS in found and found != [PIXELS]:
            raise DataError(f"images cannot be mixed with other columns: set `own.features={self._images}`")
        return found

    @property
    def spec(self) -> DataSpec:
        if self.has_pixels:
            shape = tuple(self._pixels.shape[1:])
        else:
            shape = (sum(1 if isinstance(column, np.ndarray) else column.size for column in self.inputs.values()),)
        tokens = next((column.vocabulary for column in self.inputs.values() if isinstance(column, Tokens)), 0)
        return DataSpec(self.kind, shape, len(self.classes) or 1, tokens, self.schema.to_json())

    def features_of(self, name: str) -> tuple[int, int]:
        """Return of a column of features (different examples, features of each). All numbers that are encoded are one."""
        column = next(column for at in (name, *self.inputs) if isinstance(column := self.inputs.get(at), Encoded))
        return len(column.contents), column.size

    @property
    def has_pixels(self) -> bool:
        """Whether the inputs are images as they are, and not an encoder's features of them."""
        return isinstance(self.inputs.get(PIXELS), np.ndarray)

    @property
    def _pixels(self) -> Array:
        column = self.inputs[PIXELS]
        assert isinstance(column, np.ndarray)
        return column

    # ---- tasks and their parts

    def tasks(self) -> list[TaskInfo]:
        found = []
        for name, (support, query, test) in self.rows.items():
            found.append(TaskInfo(name, len(support), len(query), len(test), split=self._splits[name]))
        return found

    def holdings(self) -> Holdings | None:
        """Return who holds what, of simulated users; None for real ones."""
        return None if self.options.partition is None else simulated.holdings(self)

    def train_draw(self, task_id: str, rng: np.random.Generator) -> TaskData:
        if self.options.encoder_views > 1:
            return self._draw_among_views(task_id, rng)
        if self.kind == "classification":
            return super().train_draw(task_id, rng)
        return self._training[task_id].draw(rng) if self.resample else self._training[task_id].data

    def _check_views(self) -> None:
        """Raise DataError if there are no pictures of which an encoder could see several views."""
        if self.options.encoder_views > 1 and not isinstance(self.inputs.get(PIXELS), Encoded):
            what = f"`own.encoder={self.options.encoder}` reads no pictures" if self.options.encoder else "there is no encoder"
            raise DataError(f"`own.encoder-views` must be 1 here, where {what}, got {self.options.encoder_views}")

    def _draw_among_views(self, task_id: str, rng: np.random.Generator) -> TaskData:
        """Return a draw in which every support and query example is one of the views of its picture."""
        pool = self.pool(task_id) if self.kind == "classification" else self._training[task_id]
        views = self._views[task_id]
        places = np.arange(len(pool.x))
        x = np.concatenate([pool.x[None], views])[rng.integers(len(views) + 1, size=len(places)), places]
        if self.resample:
            return replace(pool, x=x).draw(rng)
        support, query, test = pool.data.support, pool.data.query, pool.data.test
        parts = torch.split(torch.from_numpy(x), [len(support.x), len(query.x)])
        return TaskData(support._replace(x=parts[0]), query._replace(x=parts[1]), test)

    def _views_of(self, task_id: str) -> Array:
        """Return the further views of the support and query examples of a task as inputs, float32 [views - 1, examples, size].

        They are encoded when a task first trains, since held-out tasks need none.
        """
        rows, options = np.concatenate(self.rows[task_id][:2]), self.options
        found = encode_views(
            options.encoder,
            options.encoder_pooling,
            self.table[PIXELS],
            rows,
            options.encoder_views,
            flips=options.encoder_flips,
        )
        preparation = self._measured(task_id)
        columns = (Encoded(features, np.arange(len(rows)), []) for features in found)
        return np.stack([preparation.encode({PIXELS: column}) for column in columns])

    def seen_draw(self, task_id: str) -> TaskData:
        """Return a training task as a seen user, on the scale that it trains on."""
        if self.kind == "classification":
            return super().seen_draw(task_id)
        return all_to_support(self._training[task_id].data)

    def preparation(self, task_id: str) -> Mapping[str, Any]:
        return self._measured(task_id).to_json()

    def target_deviation(self, task_id: str, *, seen: bool = False) -> float:
        """Return the factor that converts a task's errors to the unit of its target; 1 for classes. `seen`: by `seen_draw`."""
        target = (self._training_preparation if seen else self._measured)(task_id).target
        return 1.0 if target is None else target.deviation

    @property
    def is_ordered(self) -> bool:
        """Whether the rows of a task are in the order of time."""
        return self.times is not None

    def part_of_rows(self, task_id: str) -> dict[int, str]:
        """Return "support", "query" or "test" for every row that the task uses."""
        parts = zip(("support", "query", "test"), self.rows[task_id], strict=True)
        return {int(row): part for part, rows in parts for row in rows}

    @property
    def rows_without_task(self) -> int:
        """Number of rows that name no task."""
        return int((self._tasks.codes < 0).sum())

    @property
    def task_names(self) -> list[str]:
        """The names of all tasks, also of those that are left out, in the order of their places in `tasks_of_rows`."""
        return self._tasks.values

    @property
    def tasks_of_rows(self) -> Array:
        """The task of every row as a place in `task_names`: int64 [rows], -1: it names none."""
        return self._tasks.codes

    def _training_pool(self, task_id: str) -> Pool:
        """Return the examples of a regression task for training.

        Without a shared scale the target's deviation is that of all training examples, which bounds each by the square
        root of their number. A support part of nothing but zeros would otherwise scale the others
        so much that they spoil the model. In order of time the mean is that of the support alone, as in a
        test: what comes after it may lie higher or lower.
        """
        if self.schema.target_scale:
            return Pool.of(self._data[task_id])
        preparation = self._training_preparation(task_id)
        return Pool.of(TaskData(*(self.batch(preparation, rows) for rows in self.rows[task_id])))

    def _training_preparation(self, task_id: str) -> Preparation:
        if self.schema.target_scale or self.kind == "classification":
            return self._measured(task_id)
        support, query, _ = self.rows[task_id]
        numbers = self.target.values[np.concatenate([support, query])]
        target = Scale.of(numbers, self.options.target_deviation)
        if self.times is not None:
            mean = self.target.values[support].mean()
            target = Scale(float(mean), float(np.hypot(target.deviation, target.mean - mean)))
        return replace(self._measured(task_id), target=target)

    def _measured(self, task_id: str) -> Preparation:
        return self.preparation_by(self.rows[task_id][0])

    def preparation_by(self, support: Array) -> Preparation:
        """Return the preparation that these rows of one task show, on the scales that all tasks share if they do."""
        numbers = self.target.values[support] if self.kind == "regression" else None
        brightest = white_of(self._pixels[support]) if self.has_pixels else 1.0
        found = measure(_of_rows(self.inputs, support), numbers, self.options.target_deviation, brightest)
        return found.on_shared(self.schema.scales, self.schema.target_scale)

    def _task_data(self, task_id: str) -> TaskData:
        preparation = self._measured(task_id)
        return TaskData(*(self.batch(preparation, rows) for rows in self.rows[task_id]))

    def batch(self, preparation: Preparation, rows: Array) -> Batch:
        """Return rows of one task as the model sees them."""
        x, y = preparation.encode(_of_rows(self.inputs, rows)), self.target.values[rows]
        if preparation.target is None:
            return Batch.of(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)))
        return Batch.of(torch.from_numpy(x), torch.from_numpy(preparation.target.apply(y).astype(np.float32))[:, None])

    def on_scales(self, scales: Mapping[str, list[float]], target_scale: list[float]) -> "Own":
        """Return this data set with these scales ([mean, deviation]), not read again. Raises TypeError or ValueError."""
        other = copy(self)
        other.schema = replace(self.schema, scales=dict(scales), target_scale=target_scale).checked()
        other._begin_anew()
        other.__dict__.pop("_pools", None)
        return other

    def tested_on_one_class(self, task_id: str) -> bool:
        """Return whether the test part of a task holds one class alone."""
        return self.kind == "classification" and len(np.unique(self.target.values[self.rows[task_id][2]])) < 2

    def column_moments(self, task_ids: Sequence[str]) -> dict[str, Moments]:
        """Return what the support and query rows of these tasks show of every numeric column, and of the target as ""."""
        parts = [part for task_id in task_ids for part in self.rows[task_id][:2]]
        rows = np.concatenate(parts) if parts else np.array([], dtype=np.int64)
        columns = {
            name: column[rows] for name, column in self.inputs.items() if name != PIXELS and isinstance(column, np.ndarray)
        }
        if self.kind == "regression":
            columns[TARGET] = self.target.values[rows]
        found = {name: Moments.of(column) for name, column in columns.items()}
        for name, column in self.inputs.items():
            found |= column.moments(name, rows) if isinstance(column, Encoded) else {}
        return found

    def feature_sum(self, task_ids: Sequence[str], *, by_task: bool) -> tuple[Array, float]:
        """Return (sum of the encoder's features over support and query rows of these tasks, weight).

        The sum, float64: of every column of features, in the order of their names, its features [size], and the number of its
        cells that are not empty; weight: the rows. With `by_task` the sum of the tasks' means, without numbers of cells, each
        of norm at most `encoded.most_norm`; weight: the tasks.
        """
        columns = [column for _, column in sorted(self.inputs.items()) if isinstance(column, Encoded)]
        parts = [np.concatenate(self.rows[task_id][:2]) for task_id in task_ids]
        if by_task:
            means = [np.concatenate([column.mean(rows) for column in columns]) for rows in parts]
            return sum(
                (clipped(one, most_norm(len(columns))) for one in means), np.zeros(sum(column.size for column in columns))
            ), float(len(parts))
        rows = np.concatenate(parts) if parts else np.array([], dtype=np.int64)
        return np.concatenate([part for column in columns for part in column.sum(rows)]), float(len(rows))

    def class_counts(self, task_ids: Sequence[str]) -> list[int]:
        """Return how many support and query rows of these tasks are of each class; [] for numbers."""
        if self.kind != "classification":
            return []
        parts = [part for task_id in task_ids for part in self.rows[task_id][:2]]
        rows = np.concatenate(parts) if parts else np.array([], dtype=np.int64)
        found: list[int] = np.bincount(self.target.values[rows].astype(np.int64), minlength=len(self.classes)).tolist()
        return found

    def _content_of_rows(self) -> Array:
        """Return a hash of every row, from cells alone: what other nodes agreed on must not move a row."""
        columns: list[Text | Array] = [self.target.labels or self.target.values]
        for name in sorted(self.schema.features):
            found = self.inputs.get(name)
            if found is None:  # the features of another column are those of this one as well
                continue
            if isinstance(found, Encoded | Tokens):
                columns.append(found.text)
            elif isinstance(found, Places):
                columns.append(categories(usable(self.table, name), self._reading.extra_missing))
            else:
                columns.append(found)
        return row_order.content_of(columns)

    def _cut_tasks(self) -> None:
        """Split the rows of every task into parts, and record unusable tasks, in one pass. Raises DataError."""
        options = self.options
        found = self._tasks.values
        if options.leave_out and options.leave_out not in found:
            raise DataError(f"`own.leave-out` must be one of the tasks {', '.join(found[:10])}, got '{options.leave_out}'")
        if wrong := flawed(found):
            raise DataError(
                f"the column `{options.task_column}` of '{options.path}' names a task '{wrong[0]}', which cannot be used: "
                f"{wrong[1]}",
                wrong[0],
            )
        cutting = Cutting(options, self.target, self.content, self.times, read_splits(self.table, options.split_column))
        for name, rows in sorted(_by_value(self._tasks)):
            known, split, parts = cutting.of(rows, whole=self.whole)
            if not isinstance(parts, str) and self.has_pixels:
                parts = self._check_pixels(name, known, parts[0]) or parts
            if isinstance(parts, str):
                self.left_out[name] = parts
                continue
            self.rows[name] = [known[part] for part in parts]
            self._splits[name] = ("test" if name == options.leave_out else "train") if options.leave_out else split
        if not self.rows:
            why = left_out_in_words(self.left_out) if self.left_out else "no row names one"
            many = f"; is `{options.task_column}` the column that says whose row it is (`--task`)?" if len(found) > 1 else ""
            raise DataError(f"no task of '{options.path}' can be used: {why}{many}")

    def _check_pixels(self, name: str, rows: Array, support: Array) -> str:
        """Return the reason if the support does not show which value is white, else ""."""
        white = white_of(self._pixels[rows[support]])
        if white and is_beyond_white(self._pixels[rows], white):
            self.beyond_white.append(name)
        return "" if white else NO_SCALE


def reading_of(options: OwnOptions) -> Reading:
    """Return how to read the cells of a file under these settings."""
    missing = {word.casefold() for word in listed(options.missing)}
    return Reading(options.path, options.date_order, missing, options.encoder, options.encoder_pooling, options.tokenizer)


def _of_rows(inputs: Inputs, rows: Array) -> Inputs:
    return {name: column[rows] if isinstance(column, np.ndarray) else column.take(rows) for name, column in inputs.items()}


def _by_value(text: Text) -> Iterator[tuple[str, Array]]:
    """Yield every value with its rows, ascending."""
    order = np.argsort(text.codes, kind="stable")
    ends = np.searchsorted(text.codes[order], np.arange(len(text.values) + 1))
    for place, value in enumerate(text.values):
        yield value, order[ends[place] : ends[place + 1]]


def _refuse_nearly(table: Table, column: str, path: str) -> None:
    """Raise DataError if a column's name equals `column` up to case, spaces or underscores, since it would become an input."""

    def plain(name: str) -> str:
        return re.sub(r"[\s_-]", "", name.casefold())

    for name in table:
        if plain(name) == plain(column):
            raise DataError(
                f"the data '{path}' have no column `{column}`, but `{name}`: rename it, or name it as the task column"
            )


def _require_different(options: OwnOptions, target: str) -> None:
    """Raise DataError if one column has two meanings."""
    if target == options.task_column:
        raise DataError(f"`--task` and `--target` must be two columns, got '{target}' for both")
    others = {"--target": target, "--task": options.task_column, "own.split-column": options.split_column}
    for what, name in others.items():
        if options.time_column and name == options.time_column:
            raise DataError(f"`--time` and `{what}` must be two columns, got '{name}' for both")


def _require_tasks(table: Table, options: OwnOptions) -> None:
    """Raise DataError unless the task column exists."""
    default = OwnOptions().task_column
    if options.task_column == default and default not in table:
        raise DataError(
            f"the column of '{options.path}' that says whose row it is (a patient, a hospital) is not known: use `--task`, "
            f"one of {', '.join(list(table)[:20])}"
        )
    require(table, options.task_column, options.path)
