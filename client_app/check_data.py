"""Description of a user's file, in lines for a person."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from quickbloom.common.config.run import HUB, Scalar, parse_run_config
from quickbloom.common.datasets import DATASETS, load_dataset
from quickbloom.common.datasets.base import left_out_in_words, resolve_data_dir
from quickbloom.common.datasets.holdings import Holdings, in_words, table_of
from quickbloom.common.datasets.own import Own, OwnOptions, task_of_file
from quickbloom.common.datasets.own.columns import categories
from quickbloom.common.datasets.own.encoded import FEATURES, TOKENS, Encoded, parts
from quickbloom.common.datasets.own.files.parquet_file import Unusable
from quickbloom.common.datasets.own.files.pictures import Pictures
from quickbloom.common.datasets.own.numbers import read_numbers
from quickbloom.common.datasets.own.remarks import variance_in_words
from quickbloom.common.datasets.own.text import Array, Text, as_text
from quickbloom.common.datasets.own.vocabulary import Places, input_names
from quickbloom.common.datasets.partitioned import PartitionedDataset
from quickbloom.common.errors import ConfigError
from quickbloom.common.partition import Partition
from quickbloom.common.printable import one_line

_MOST_TASKS = 50
_MOST_SHOWN = 64
"""Most inputs of a row to show."""
"""Most tasks with their own lines."""


def describe(
    path: str,
    task: str,
    target: str,
    task_name: str = "",
    settings: Mapping[str, Scalar] = MappingProxyType({}),
    show: int = 0,
    time: str = "",
) -> Iterator[str]:
    """Yield lines on rows, columns with ranges and missing values, tasks and classes. Raises DataError for unusable data.

    `task`: the task column, which must exist; "": `task` if there is one, else all rows are one
    task. `task_name`: name of that task; "": the name of the file. `settings`: further settings of
    a run, such as {"own.shots": 5}. `show`: number of rows to show at the end as the model sees
    them. `time`: the column by which rows are cut, "": none. With the setting `partition` the table of users and classes is
    told instead of tasks; `path` may then also name a data set that is spread over users, such as fashion-mnist or hub:NAME.
    """
    if is_table(path):
        yield from map(one_line, _spread(path, task or target or time, settings))
        return
    run = parse_run_config({"dataset": "own", **settings}).table("own")
    assert isinstance(run, OwnOptions)
    name = task_name or run.task_name or ("" if task or run.partition else task_of_file(path))
    given = {"task_column": task, "task_name": name, "target_column": target, "time_column": time}
    options = run.model_copy(update={"path": path} | {key: value for key, value in given.items() if value})
    yield from map(one_line, _lines(Own(options, Path()), show))


def is_table(path: str) -> bool:
    """Return whether a data set of this name, and no file, is one that can be spread over simulated users."""
    kind = DATASETS.get("hub" if path.startswith(HUB) else path)
    return kind is not None and issubclass(kind, PartitionedDataset) and not Path(path).exists()


def _spread(name: str, column: str, settings: Mapping[str, Scalar]) -> Iterator[str]:
    if column:
        raise ConfigError(
            f"`--task`, `--target` and `--time` name columns of a file, got '{column}' with '{name}': leave it out"
        )
    config = parse_run_config({**settings, "dataset": name})
    dataset = load_dataset(config.dataset, config.table(config.dataset), resolve_data_dir(config.data_dir))
    assert isinstance(dataset, PartitionedDataset)
    found = dataset.holdings()
    if config.spread is None or found is None:
        yield f"{name}: {len(dataset.tasks())} users of its own; `--partition` spreads its examples over simulated ones"
        return
    yield f"{name}: classification; inputs {dataset.spec.input_shape}"
    yield from _holdings(config.spread, found)
    if dataset.left_out:
        yield left_out_in_words(dataset.left_out)


def _holdings(by: Partition, found: Holdings) -> Iterator[str]:
    yield f"partition {by.in_words()}: {in_words(found)}"
    yield from table_of(found)


def _lines(own: Own, show: int) -> Iterator[str]:
    yield f"rows: {own.table.rows}; {own.kind}; inputs {own.spec.input_shape}"
    if own.one_task:
        yield (
            f"no column `{own.options.task_column}` says whose row it is: all rows are one task, to the server "
            f"'{own.options.task_name}', unless the run names a task column that is here"
        )
    for name in own.table:
        if not (own.one_task and name == own.options.task_column):
            yield _column(own, name)
    found = own.holdings()
    yield from _holdings(own.options.partition, found) if own.options.partition and found else _tasks(own)
    yield from variance_in_words(own)
    if own.left_out:
        yield left_out_in_words(own.left_out)
    for remark in own.remarks:
        yield f"remark: {remark}"
    yield from show_rows(own, show)


def _column(own: Own, name: str) -> str:
    column, kind = own.table[name], own.schema.features.get(name, "")
    if isinstance(column, Unusable):
        return f"column {name}: neither numbers nor text, not used"
    if kind == TOKENS:
        return f"column {name}: text, as at most {own.spec.input_shape[0]} of {own.spec.tokens} token ids"
    if kind == FEATURES:
        number, size = own.features_of(name)
        return f"column {name}: {number} different of {len(column)}, each encoded as {size} features of unit length"
    if isinstance(column, Pictures):
        return f"column {name}: {len(column)} pictures, not used"
    if isinstance(column, np.ndarray) and column.ndim > 1:
        return f"column {name}: numbers {column.min():g} .. {column.max():g}, 0 missing"
    if name == own.options.task_column:
        return f"column {name}: {len(own.rows) + len(own.left_out)} tasks, {own.rows_without_task} rows without one"
    if kind == "text" or (not kind and isinstance(column, Text) and not _is_numeric_target(own, name)):
        text = categories(column) if kind else as_text(column)
        return f"column {name}: text, {len(text.values)} different values, {int((text.codes < 0).sum())} missing"
    numbers = own.inputs[name] if kind else own.target.values if name == own.schema.target else column
    assert isinstance(numbers, np.ndarray)
    return f"column {name}: {_range(numbers, kind)}{_convention(own, name)}"


def _is_numeric_target(own: Own, name: str) -> bool:
    return name == own.schema.target and own.kind == "regression"


def _range(numbers: Array, kind: str) -> str:
    if numbers.dtype.kind in "mM":
        return f"dates, {int(np.isnat(numbers).sum())} missing"
    numbers = np.asarray(numbers, dtype=np.float64)
    known = numbers[~np.isnan(numbers)]
    span = f"{known.min():g} .. {known.max():g}" if len(known) else "empty"
    what = {"date": "dates, in days since 1970,", "time": "times, in hours,"}.get(kind, "numbers")
    return f"{what} {span}, {len(numbers) - len(known)} missing"


def _convention(own: Own, name: str) -> str:
    column = own.table[name]
    how = read_numbers(column, own.table.decimal).how if isinstance(column, Text) else ""
    return f" ({how})" if how and own.schema.features.get(name, "number") == "number" else ""


def _tasks(own: Own) -> Iterator[str]:
    infos = own.tasks()
    for info in infos[:_MOST_TASKS]:
        yield f"task {info.task_id}: {info.num_support} support, {info.num_query} query, {info.num_test} test examples"
        if own.kind == "classification":
            labels = own.target.values[np.concatenate(own.rows[info.task_id])].astype(np.int64)
            counts = np.bincount(labels, minlength=len(own.classes))
            yield "  classes: " + ", ".join(f"{label} {count}" for label, count in zip(own.classes, counts, strict=True))
    if more := infos[_MOST_TASKS:]:
        totals = [info.num_support + info.num_query + info.num_test for info in more]
        yield f"and {len(more)} more tasks, of {min(totals)} to {max(totals)} rows"


def show_rows(own: Own, count: int) -> Iterator[str]:
    """Yield the first used rows as the model sees them: every input by name, and the target."""
    parts = {row: (task, part) for task in list(own.rows)[:_MOST_TASKS] for row, part in own.part_of_rows(task).items()}
    for row in sorted(parts)[:count]:
        task, part = parts[row]
        data = own.test_draws(task)[0]
        batch = {"support": data.support, "query": data.query, "test": data.test}[part]
        at = int(np.flatnonzero(own.rows[task][("support", "query", "test").index(part)] == row)[0])
        x, y = batch.x[at].numpy(), batch.y[at].numpy()
        said = f"target {own.classes[int(y)]} (class {int(y)})" if own.kind == "classification" else f"target {float(y[0]):.4g}"
        yield f"row {row + 1}: task {task}, {part}; {_inputs_in_words(own, x)}; {said}"


def _inputs_in_words(own: Own, x: Array) -> str:
    if own.spec.tokens:
        return "token ids " + " ".join(str(int(one)) for one in x)
    if own.has_pixels:
        return f"pixels {x.shape}, {x.min():.3g} .. {x.max():.3g}, mean {x.mean():.3g}"
    names = []
    for name, column in own.inputs.items():
        held = own.table.get(name)
        text = categories(held) if isinstance(column, Places) and not isinstance(held, Unusable | Pictures | None) else None
        if isinstance(column, Encoded):
            names += parts(name, column.size)
        else:
            names += input_names(name, text, own.schema.vocabularies.get(name, [])) if isinstance(column, Places) else [name]
    shown = [f"{name} {value:.4g}" for name, value in zip(names, x, strict=True)]
    return ", ".join(shown[:_MOST_SHOWN]) + (f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else "")
