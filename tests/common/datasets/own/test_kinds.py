"""Columns of another file are what they were in training, or are refused; what nobody measured is no input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quickbloom.client_app.check_data import describe
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.columns import Reading, of_kind
from quickbloom.common.datasets.own.files.tables import Table
from quickbloom.common.datasets.own.preparation import measure
from quickbloom.common.errors import DataError


def own(path: Path, schema: str = "", **options: object) -> Own:
    return Own(OwnOptions.model_validate({"path": str(path), **options}), Path(), schema)


def csv(path: Path, **columns: Callable[[int], object]) -> Path:
    """30 rows of one task; a function of the row for each column."""
    rows = [",".join(f'"{cell(row)}"' for cell in columns.values()) for row in range(30)]
    path.write_text("\n".join([",".join(["task", *columns]), *(f"A,{row}" for row in rows)]))
    return path


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        ("time", np.array([5], dtype="timedelta64[h]")),
        ("time", np.array(["2024-01-01"], dtype="datetime64[D]")),
        ("number", np.array(["2024-01-01"], dtype="datetime64[D]")),
        ("date", np.array([5], dtype="timedelta64[h]")),
        ("date", np.array([45000])),
    ],
)
def test_typed_cells_of_another_kind_are_refused(kind: str, column: np.ndarray[Any, Any]) -> None:
    with pytest.raises(DataError, match=f"must hold {kind}s, as it did in training, got "):
        of_kind(Table({"x": column}), "x", kind, Reading("f"))


def test_numbers_of_a_column_that_the_support_lacks_are_no_input() -> None:
    """57 years would else be an input of 10 where no age was ever seen."""
    preparation = measure({"age": np.array([np.nan, np.nan])}, None)
    assert preparation.encode({"age": np.array([57.0, np.nan])}).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("unit", [1e-100, 1e-15, 1.0, 1e15])
def test_the_spread_of_a_column_does_not_hang_on_its_unit(unit: float) -> None:
    preparation = measure({"x": np.array([1.0, 3.0]) * unit}, np.array([1.0, 3.0]) * unit)
    assert preparation.encode({"x": np.array([5.0]) * unit})[0, 0] == pytest.approx(3)
    assert preparation.target is not None
    assert preparation.target.deviation == pytest.approx(unit)


@pytest.mark.parametrize(
    ("cell", "first"),
    [(lambda row: f"2024-03-{row + 1:02d}", 19783.0), (lambda row: f"{row % 24}:30", 0.5)],
    ids=["dates", "times"],
)
def test_dates_and_times_can_be_predicted_also_on_another_file(
    tmp_path: Path, cell: Callable[[int], str], first: float
) -> None:
    path = csv(tmp_path / "a.csv", x=lambda row: row / 2, y=cell)
    data = own(path, **{"target-column": "y"})
    assert data.kind == "regression"
    again = own(path, data.schema.to_json(), **{"target-column": "y"})
    assert again.target.values[0] == pytest.approx(first)
    words = csv(tmp_path / "b.csv", x=lambda row: row / 2, y=lambda row: "ab"[row % 2])
    with pytest.raises(DataError, match=r"the target `y` of .* must hold numbers, as it did in training"):
        own(words, data.schema.to_json(), **{"target-column": "y"})


def test_numbers_that_are_days_are_remarked_on_and_lines_are_lines(tmp_path: Path) -> None:
    path = csv(
        tmp_path / "a.csv", day=lambda row: 20240301 + row, other=lambda row: 20240271 + row // 2, y=lambda row: "ab"[row % 2]
    )
    path.write_text(path.read_text().replace("other", '"ot\x1b[31mher"'))
    lines = list(describe(str(path), "task", "y", show=2))
    remarks = [line for line in lines if line.startswith("remark: ")]
    assert remarks == ["remark: the column `day` holds numbers such as 20240301: if they are dates, write them as 2024-03-01"]
    assert all(line.isprintable() for line in lines)
