"""A user's own data: what is read, how it is cut and scaled, and what is refused in one sentence."""

import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from common.datasets.own import Own, OwnOptions
from common.datasets.tables import read_table
from common.errors import DataError

FUZZ = int(os.environ.get("QUICKBLOOM_FUZZ", "100"))
"""Damaged inputs for every format."""


def own(path: Path, **options: object) -> Own:
    return Own(OwnOptions.model_validate({"path": str(path), **options}), Path())


def hospitals(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [f"{h},{rng.normal(60, 10):.2f},{'x' if i % 3 else ''},{'ab'[i % 2]}" for h in "ABCD" for i in range(20)]
    path = tmp_path / "h.csv"
    path.write_text("\n".join(["task,age,sex,y", *rows, "A,,x,a"]) + "\n")
    return path


def test_inputs_are_standardised_from_the_support_part_alone(tmp_path: Path) -> None:
    data = own(hospitals(tmp_path)).test_draws("B")[0]
    assert float(data.support.x[:, 0].mean()) == pytest.approx(0, abs=1e-5)
    assert float(data.support.x[:, 0].std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert abs(float(data.test.x[:, 0].mean())) > 1e-3


def _member(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def _npy(array: object, shape: str | None = None) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue().replace(b"(3,)", shape.encode()) if shape else file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"task,x,y\n", "hold no rows"),
        ("a.csv", b"task,x,y\n1,2,a\n1,3,a\n", "at least two classes"),
        ("a.csv", b"task,x,y\n1,inf,a\n1,3,b\n", "infinite values"),
        ("a.csv", b"task,x,y\n1,2,a\n1,3,b\n", "too few for support, query and test"),
        ("a.npz", _member("x.npy", _npy(np.array([{}], dtype=object))), "never loaded"),
        ("a.npz", _member("../x.npy", _npy([1.0, 2, 3])), "outside of itself"),
        ("a.npz", _member("x.npy", _npy([1.0, 2, 3], "(1250000000,)")), "claim 10.0 GB"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        own(tmp_path / name)


def test_text_where_numbers_belong_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold numbers for regression, got the text 'a'"):
        own(hospitals(tmp_path), kind="regression")


def mixed(column: str, values: list[str]) -> bytes:
    """20 rows of one task with the columns x and y, `values` among one of them."""
    xs, ys = [f"{i}.5" for i in range(20)], [f"{i}.25" for i in range(20)]
    chosen = xs if column == "x" else ys
    chosen[2 : 2 + len(values)] = values
    return "\n".join(["task,x,y", *(f"A,{x},{y}" for x, y in zip(xs, ys, strict=True))]).encode()


@pytest.mark.parametrize(
    ("column", "advice"), [("x", "set `own.categorical=x`"), ("y", "set `own.kind=classification`")], ids=["feature", "target"]
)
def test_a_word_among_numbers_is_refused_with_its_row_and_a_way_out(tmp_path: Path, column: str, advice: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(mixed(column, ["NA", "", "sixty"]))
    sentence = f"the column `{column}` holds numbers, but row 5 (without the header) holds the text 'sixty': put a number there"
    with pytest.raises(DataError, match=re.escape(sentence)) as caught:
        own(path)
    assert str(caught.value).endswith(advice)


@pytest.mark.parametrize("column", ["x", "y"])
def test_empty_and_na_cells_among_numbers_are_missing_values(tmp_path: Path, column: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(mixed(column, ["NA", "", "n/a"]))
    data = own(path)
    assert (data.kind, data.spec.input_shape) == ("regression", (1,))
    assert int(np.isnan(data.table[column]).sum()) == 3
    parts = data.test_draws("A")[0]
    # Rows without a target are not used, rows without a feature are.
    assert sum(len(part.x) for part in (parts.support, parts.query, parts.test)) == (20 if column == "x" else 17)


def test_a_column_may_be_declared_categorical(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(mixed("x", ["sixty"]))
    assert own(path, categorical="x").spec.input_shape == (8,)
    path.write_bytes(mixed("x", []))
    assert (own(path).spec.input_shape, own(path, categorical="x").spec.input_shape) == ((1,), (8,))
    with pytest.raises(DataError, match="have no column `z`"):
        own(path, categorical="z")


def test_the_type_of_a_column_is_that_of_all_rows_of_a_long_file(tmp_path: Path) -> None:
    # More than pyarrow's first megabyte holds whole numbers only.
    path = tmp_path / "a.csv"
    path.write_text("task,x,y\n" + "A,123456,1.5\n" * 100_000 + "A,0.5,2.5\n")
    assert read_table(str(path))["x"][-1] == 0.5


def test_fewer_examples_than_ways_times_shots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`own\.shots` needs 50"):
        own(hospitals(tmp_path), shots=50)


def _valid(kind: str, folder: Path) -> bytes:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = folder / f"valid.{kind}"
    columns = {"task": ["A", "B"] * 6, "x": [float(i) for i in range(12)], "y": ["a", "a", "b", "b"] * 3}
    if kind == "npz":
        np.savez(path, task=np.array(columns["task"]), x=np.array(columns["x"]), y=np.array(columns["y"]))
    elif kind == "parquet":
        pq.write_table(pa.table(columns), path)
    elif kind == "csv":
        path.write_text("task,x,y\n" + "\n".join(f"{t},{x},{y}" for t, x, y in zip(*columns.values(), strict=True)))
    else:
        path.write_text("\n".join(f'{{"task":"{t}","x":{x},"y":"{y}"}}' for t, x, y in zip(*columns.values(), strict=True)))
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["npz", "csv", "parquet", "jsonl"])
def test_damaged_files_raise_data_errors_alone(kind: str, tmp_path: Path) -> None:
    rng, valid, refused = np.random.default_rng(0), _valid(kind, tmp_path), 0
    assert len(read_table(str(tmp_path / f"valid.{kind}"))["x"]) == 12
    for number in range(FUZZ):
        damaged = np.frombuffer(valid, np.uint8).copy() if number % 4 else rng.integers(0, 256, 200, dtype=np.uint8)
        places = rng.integers(0, len(damaged), rng.integers(1, 9))
        damaged[places] = rng.integers(0, 256, len(places))
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(damaged[: rng.integers(1, len(damaged) + 1)].tobytes() if number % 3 == 0 else damaged.tobytes())
        try:
            own(path)
        except DataError:
            refused += 1
        path.unlink()
    assert refused
