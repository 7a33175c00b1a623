"""Remarks on cells, rows and classes: what was converted or is silently ignored, and what may be a slip."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from quickbloom.common.datasets.own.columns import EMPTY, NUMBER, TEXT, Schema, categories, usable
from quickbloom.common.datasets.own.dates import read_moments
from quickbloom.common.datasets.own.files.image_arrays import beyond_white
from quickbloom.common.datasets.own.files.tables import PIXELS, Table
from quickbloom.common.datasets.own.numbers import read_numbers
from quickbloom.common.datasets.own.preparation import has_spread
from quickbloom.common.datasets.own.text import MISSING_WORDS, Array, Text
from quickbloom.common.errors import as_told
from quickbloom.common.formatting import counted

if TYPE_CHECKING:
    from quickbloom.common.datasets.own.dataset import Own

_MOST_TOLD = 5
_FEW = 10
"""Classes with fewer rows than this may be misspellings; and fewest numbers for a remark on dates."""
_MOSTLY_DIFFERENT = 0.9
_LEAST_ROWS = 20
"""Fewest rows of a text column for which it is notable that its values differ."""
_LARGEST_EXACT = 2**53


def of(data: Own) -> list[str]:
    """Return these remarks on a file, in the order in which it is read."""
    parts = (beyond_white(data.beyond_white), _columns(data), _rows(data), _targets(data), _tasks(data))
    return [*data.table.remarks, *(remark for part in parts for remark in part)]


def _columns(data: Own) -> Iterator[str]:
    for name, kind in data.schema.features.items():
        column = data.table[name]
        if kind == EMPTY:
            yield f"the column `{name}` is empty: it is no input worth having"
        if name == PIXELS:
            continue
        if kind == TEXT:
            yield from _on_categories(data, name)
        elif kind == NUMBER:
            yield from _on_numbers(name, column, data.table.decimal)
            yield from _on_dates(name, data.inputs[name])


def _on_categories(data: Own, name: str) -> Iterator[str]:
    text = categories(usable(data.table, name))
    rows, values = int((text.codes >= 0).sum()), len(text.values)
    if rows >= _LEAST_ROWS and values >= _MOSTLY_DIFFERENT * rows:
        yield (
            f"{values} of {rows} values of the column `{name}` differ: as categories they say nothing of new rows; are they "
            "ids, or numbers or dates in words? leave it out with `own.features`, or write numbers"
        )
    if values > data.options.vocabulary_limit and not data.schema.vocabularies.get(name, [])[data.options.vocabulary_limit :]:
        yield (
            f"the column `{name}` has {values} categories, of which `own.vocabulary-limit` ({data.options.vocabulary_limit}) "
            "are inputs of their own, the most frequent; the others are one"
        )


def on_doubtful_numbers(table: Table, schema: Schema) -> Iterator[str]:
    """Yield remarks on ambiguous numbers of a file that a model is applied to."""
    for name, kind in schema.features.items():
        if kind == NUMBER and name != PIXELS:
            yield from _on_numbers(name, table[name], table.decimal)


def _on_dates(name: str, numbers: Any) -> Iterator[str]:
    """Yield a remark if all numbers are calendar days written as YYYYMMDD, which are unevenly spaced as numbers."""
    found = np.unique(numbers[~np.isnan(numbers)])
    if len(found) < _FEW or not ((found >= 1900_01_01) & (found <= 2099_12_31) & (found == np.round(found))).all():
        return
    text = Text.of(f"{number // 10000:.0f}-{number // 100 % 100:02.0f}-{number % 100:02.0f}" for number in found)
    if not read_moments(text).wrong.any():
        yield f"the column `{name}` holds numbers such as {found[0]:.0f}: if they are dates, write them as {text.values[0]}"


def _on_numbers(name: str, column: Any, decimal: str) -> Iterator[str]:
    if not isinstance(column, Text):
        return
    found = read_numbers(column, decimal)
    if found.either >= 0:
        cell, number = column.values[found.either], found.numbers[found.either]
        yield f"'{cell}' in the column `{name}` is read as {number:.12g}: if it is another number, write it without that sign"
    if padded := next((value for value in column.values if re.fullmatch(r"0[0-9]+", value)), None):
        yield (
            f"the column `{name}` holds whole numbers that begin with 0, such as '{padded}': if they are codes, declare "
            f"categories with `--set own.categorical={name}`"
        )


def _rows(data: Own) -> Iterator[str]:
    table, options = data.table, data.options
    rows = f"{counted(table.rows, 'row')} of '{options.path}'"
    if without := data.rows_without_task:
        yield f"{without} of {rows} name no task (`{options.task_column}`): they are not used"
    if without := int(np.isnan(data.target.values).sum()):
        yield f"{without} of {rows} have no target (`{data.schema.target}`): they are not used"
    if data.times is not None:
        yield from _on_moments(data, rows)
    column = table[options.task_column]
    if isinstance(column, np.ndarray) and column.dtype.kind == "f" and (np.abs(column) >= _LARGEST_EXACT).any():
        yield (
            f"the tasks in `{options.task_column}` are numbers of 16 digits and more with a decimal point, which no longer "
            "tells them all apart: write them as whole numbers or text"
        )


def _on_moments(data: Own, rows: str) -> Iterator[str]:
    assert data.times is not None
    name, named, targets = data.options.time_column, data.tasks_of_rows >= 0, ~np.isnan(data.target.values)
    left_out = [place for place, task in enumerate(data.task_names) if task in data.left_out]
    if without := int((np.isnan(data.times) & named & targets).sum()):
        yield f"{without} of {rows} have no moment (`{name}`): they are not used"
    used = sum(len(part) for parts in data.rows.values() for part in parts)
    there = named & targets & ~np.isnan(data.times) & ~np.isin(data.tasks_of_rows, left_out)
    if left := int(there.sum()) - used:
        yield (
            f"{left} of {rows} come before the last of the first `own.shots` ({data.options.shots}) in `{name}` and are not "
            "among them: no part has them"
        )


def _targets(data: Own) -> Iterator[str]:
    if data.kind == "regression":
        yield from _without_spread(data)
        return
    labels = data.target.labels
    if labels is None:
        return
    counts = dict(zip(labels.values, map(int, labels.counts()), strict=True))
    yield from _slips(counts, data.classes, data.options.path)
    for label in data.classes:
        if label.casefold() in MISSING_WORDS and counts.get(label):
            yield (
                f"{counted(counts[label], 'row')} of '{data.options.path}' are of the class '{label}': if that means that the "
                f"target is missing, set `own.missing={label}`"
            )
    if not data.whole:
        yield from _never_tested(data)


def _without_spread(data: Own) -> Iterator[str]:
    if data.options.scale != "task":
        return  # a support without spread then has the scale of all tasks
    supports = {name: data.target.values[rows[0]] for name, rows in data.rows.items()}
    flat = sorted(name for name, numbers in supports.items() if not has_spread(numbers))
    if not flat:
        return
    others = [numbers - numbers.mean() for name, numbers in supports.items() if name not in set(flat)]
    typical = f"; that of the others is {np.concatenate(others).std():.3g}" if others else ""
    yield (
        f"all targets in the support part of {counted(len(flat), 'task')} are the same ({_some(flat)}): their deviation is "
        f"taken for `own.target-deviation` ({data.options.target_deviation:g}){typical}"
    )


def _never_tested(data: Own) -> Iterator[str]:
    number = len(data.classes)
    without = np.zeros(number, dtype=np.int64)
    for parts in data.rows.values():
        held, tested = (
            np.bincount(data.target.values[rows].astype(np.int64), minlength=number) for rows in _all_and_test(parts)
        )
        without += (held > 0) & (tested == 0)
    said = [
        f"{_quoted(label)} in {tasks} of {len(data.rows)} tasks"
        for label, tasks in zip(data.classes, without, strict=True)
        if tasks
    ]
    if said:
        why = f"without a row in the test part, the last in `{data.options.time_column}`"
        why = "with too few rows for a test row" if data.times is None else why
        yield f"classes {why}: {_some(said)}; the scores of those tasks say nothing of them"


def _all_and_test(parts: list[Array]) -> tuple[Array, Array]:
    return np.concatenate(parts), parts[2]


def _tasks(data: Own) -> Iterator[str]:
    options, found = data.options, len(data.left_out) + len(data.rows)
    if len(data.left_out) > len(data.rows):
        yield (
            f"{len(data.left_out)} of {found} tasks of '{options.path}' cannot be used: is `{options.task_column}` the column "
            "that says whose row it is (`--task`)?"
        )
    for name in (*data.rows, *data.left_out):
        if name.casefold() in MISSING_WORDS:
            yield (f"a task is called '{name}': if that means that rows name no task, set `own.missing={name}`")


def _slips(counts: dict[str, int], classes: list[str], path: str) -> Iterator[str]:
    """Yield remarks on classes that may be misspellings: equal up to case and spaces, or very rare."""
    alike: dict[str, list[str]] = {}
    for label in classes:
        alike.setdefault("".join(label.casefold().split()), []).append(label)
    same = [" and ".join(map(_quoted, group[:_MOST_TOLD])) for group in alike.values() if len(group) > 1]
    total = Counter(counts).total()
    least = min(_FEW, total / len(classes) / 10)
    rare = [f"{_quoted(label)} ({counts[label]})" for label in classes if 0 < counts.get(label, 0) < least]
    if same:
        yield (
            f"classes of '{path}' differ in case or blanks alone, {_some(same)}: if they are one class, give them one spelling"
        )
    if rare:
        yield (
            f"classes of '{path}' have few of its {total} rows, {_some(rare)}: mend what is a slip, for every class "
            "is an output of the model"
        )


def _quoted(label: str) -> str:
    return f"'{as_told(label, 60)}'"


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _MOST_TOLD} more" if len(items) > _MOST_TOLD else ""
    return "; ".join(items[:_MOST_TOLD]) + more
