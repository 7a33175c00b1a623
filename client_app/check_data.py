"""What a user's file holds, in lines for a person."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.datasets.own import Own, OwnOptions


def describe(path: str, task: str, target: str) -> Iterator[str]:
    """Rows, columns with ranges and missing values, tasks, classes. Raises DataError for what cannot be used."""
    own = Own(OwnOptions(path=path, task_column=task, target_column=target), Path())
    yield f"rows: {len(next(iter(own.table.values())))}; {own.kind}; inputs {own.spec.input_shape}"
    for name, column in own.table.items():
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
