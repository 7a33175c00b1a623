"""What a user's file holds, in lines for a person."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.datasets.own import Own, OwnOptions, task_of_file


def describe(path: str, task: str, target: str, task_name: str = "") -> Iterator[str]:
    """Rows, columns with ranges and missing values, tasks, classes. Raises DataError for what cannot be used.

    `task`: the task column, which must be there; "": `task` if there is one, else all rows are one task. `task_name`: its name
    in a file without a task column, "": that of the file.
    """
    name = task_name or ("" if task else task_of_file(path))
    options = OwnOptions(path=path, task_column=task or "task", task_name=name, target_column=target)
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
    for name, reason in own.left_out.items():
        yield f"task {name} is left out: {reason}"
