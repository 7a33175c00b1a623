"""What a user's file holds, in lines for a person."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from common.config import Scalar, parse_run_config
from common.datasets.base import left_out_in_words
from common.datasets.own import Own, OwnOptions, task_of_file


def describe(
    path: str, task: str, target: str, task_name: str = "", settings: Mapping[str, Scalar] = MappingProxyType({})
) -> Iterator[str]:
    """Rows, columns with ranges and missing values, tasks, classes. Raises DataError for what cannot be used.

    `task`: the task column, which must be there; "": `task` if there is one, else all rows are one task. `task_name`: its name
    in a file without a task column, "": that of the file. `settings`: others of a run, such as {"own.shots": 5}.
    """
    run = parse_run_config({"dataset": "own", **settings}).table("own")
    assert isinstance(run, OwnOptions)
    name = task_name or run.task_name or ("" if task else task_of_file(path))
    given = {"task_column": task, "task_name": name, "target_column": target}
    options = run.model_copy(update={"path": path} | {key: value for key, value in given.items() if value})
    own = Own(options, Path())
    yield f"rows: {len(next(iter(own.table.values())))}; {own.kind}; inputs {own.spec.input_shape}"
    if own.one_task:
        yield (
            f"no column `{options.task_column}` says whose row it is: all rows are one task, to the server '{name}', "
            "unless the run names a task column that is here"
        )
    for name, column in own.table.items():
        if own.one_task and name == options.task_column:
            continue
        if column.dtype == object:
            words = [value for value in column if value is not None]
            yield f"column {name}: text, {len(set(words))} different values, {len(column) - len(words)} missing"
        else:
            known = column[~np.isnan(column)]
            span = f"{known.min():g} .. {known.max():g}" if len(known) else "empty"
            yield f"column {name}: numbers {span}, {int(np.isnan(column).sum())} missing"
    for info in own.tasks():
        yield f"task {info.task_id}: {info.num_support} support, {info.num_query} query, {info.num_test} test examples"
        if own.kind == "classification":
            data = own.test_draws(info.task_id)[0]
            labels = np.concatenate([part.y.numpy() for part in (data.support, data.query, data.test)])
            counts = np.bincount(labels, minlength=len(own.classes))
            yield "  classes: " + ", ".join(f"{label} {count}" for label, count in zip(own.classes, counts, strict=True))
    if own.left_out:
        yield left_out_in_words(own.left_out)
    for remark in own.remarks:
        yield f"remark: {remark}"
