"""A user's own data: what is read, how it is cut and scaled, and what is refused in one sentence."""

import io
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.columns import Reading, categories, of_kind, usable
from quickbloom.common.datasets.own.files.tables import Table, read_table
from quickbloom.common.errors import DataError


def own(path: Path, **options: object) -> Own:
    return Own(OwnOptions.model_validate({"path": str(path), **options}), Path())


def numbers(table: Table, name: str) -> np.ndarray[Any, Any]:
    """A column of a file as numbers."""
    return np.asarray(of_kind(table, name, "number", Reading("")))


def hospitals(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [f"{h},{rng.normal(60, 10):.2f},{'x' if i % 3 else ''},{'ab'[i % 2]}" for h in "ABCD" for i in range(20)]
    path = tmp_path / "h.csv"
    path.write_text("\n".join(["task,age,sex,y", *rows, "A,,x,a"]) + "\n")
    return path


def test_one_column_cannot_be_task_and_target(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("task,x\na,1\nb,2\n")
    with pytest.raises(DataError, match="`--task` and `--target` must be two columns, got 'task' for both"):
        Own(OwnOptions(path=str(tmp_path / "f.csv"), target_column="task"), tmp_path)


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


class _Bomb:
    """What a pickle would do if it were loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _go_off, ("loaded",)


def _go_off(word: str) -> None:
    raise AssertionError(f"the pickle was {word}")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"task,x,y\n", "hold no rows"),
        ("a.csv", b"task,x,y\n1,2,a\n1,3,a\n", "at least two classes"),
        ("a.csv", b"task,x,y\n1,inf,a\n1,3,b\n", "infinite values"),
        ("a.csv", b"task,x,y\n1,1e31,a\n1,3,b\n", "numbers beyond 1e"),
        ("a.csv", b"task,x,y\n1,2,1e31\n1,3,2.5\n", "target holds numbers beyond 1e"),
        (
            "a.csv",
            b"task,x,y\n1,2,a\n1,3\n",
            r"row 2 of '.*' \(without the header\) has 2 columns, the header 3: mend or remove it",
        ),
        ("a.csv", b"task,x,y\nA,2,a\nA,3,caf\xe9\n", r"is not in UTF-8 \(line 3\): save it as UTF-8"),
        ("a.csv", b"task,x,y\n" + b"A,2,a\n" * 300_000 + b"A,3,caf\xe9\n", r"is not in UTF-8 \(line 300002\)"),
        ("a.csv", "task,x,y\nA,2,a\n".encode("utf-16"), "is not in UTF-8"),
        ("a.csv", b"task,x,y\n1,2,a\n1,3,b\n", "too few for support, query and test"),
        ("a.npz", _member("x.npy", _npy(np.array([{}], dtype=object))), "never loaded"),
        ("a.npz", _member("/x.npy", _npy([1.0, 2, 3])), "outside of itself"),
        ("a.npz", _member("x.npy", _npy([1.0, 2, 3], "(300,)")), "claims more than the file holds"),
        ("a.npz", _member("x.pkl", pickle.dumps(_Bomb())), "cannot be read"),
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
    ("column", "advice"),
    [("x", "`--set own.categorical=x`"), ("y", "`--set own.kind=classification`")],
    ids=["feature", "target"],
)
def test_a_word_among_numbers_is_refused_with_its_row_and_a_way_out(tmp_path: Path, column: str, advice: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(mixed(column, ["NA", "", "sixty"]))
    sentence = f"the column `{column}` holds numbers, but row 5 (without the header) holds the text 'sixty': put a number there"
    with pytest.raises(DataError, match=re.escape(sentence)) as caught:
        own(path)
    assert str(caught.value).endswith(advice)


@pytest.mark.parametrize(
    "header",
    ["Alter, Jahre;task;y", '"Alter, in, Jahren";task;y', "\nAlter;task;y", "Alter;task;y"],
    ids=["comma in a name", "quoted", "empty line", "plain"],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_commas_in_the_header_or_in_numbers_are_not_between_columns(tmp_path: Path, header: str, ending: str) -> None:
    lines = [*header.split("\n"), *(f"{i},5;A;{'ab'[i % 2]}" for i in range(10))]
    path = tmp_path / "a.csv"
    path.write_bytes(ending.join(lines).encode())
    table = read_table(str(path))
    assert list(table)[1:] == ["task", "y"]
    np.testing.assert_array_equal(numbers(table, next(iter(table))), np.arange(10) + 0.5)


@pytest.mark.parametrize(("word", "refused"), [("none", False), ("", False), ("B7", True), ("1.23,5", True)])
def test_a_column_with_decimal_commas_is_one_of_numbers(tmp_path: Path, word: str, refused: bool) -> None:
    """Also with a missing value; a word in it, or what is no number by that convention, is refused with its row."""
    cells = [f"{i},5" for i in range(9)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["task;x;y", *(f"A;{x};{'ab'[i % 2]}" for i, x in enumerate([*cells, word]))]))
    if refused:
        with pytest.raises(DataError, match=rf"`x` holds numbers, but row 10 .* the text '{word}'"):
            own(path)
    else:
        assert int(np.isnan(numbers(own(path).table, "x")).sum()) == 1


def test_classes_in_files_of_different_dialects_are_the_same(tmp_path: Path) -> None:
    for name, sign in (("a", ","), ("b", ";")):
        rows = [f"A{sign}{i}{sign}{i % 2}.0" for i in range(10)]
        (tmp_path / f"{name}.csv").write_text("\n".join([sign.join(("task", "x", "y")), *rows]))
    assert own(tmp_path / "a.csv").spec == own(tmp_path / "b.csv").spec


def test_many_classes_that_may_be_slips_are_one_remark_each(tmp_path: Path) -> None:
    rows = [f"A,{i},{'ab'[i % 2]}" for i in range(4000)] + [f"A,0,c{i}" for i in range(30)] + ["A,0,C1"]
    (tmp_path / "a.csv").write_text("\n".join(["task,x,y", *rows]))
    alike, rare, untested = own(tmp_path / "a.csv").remarks
    assert untested.startswith("classes with too few rows for a test row: 'C1' in 1 of 1 tasks; 'c0' in 1 of 1 tasks; ")
    assert "differ in case or blanks alone, 'C1' and 'c1': if they are" in alike
    assert re.search(r"have few of its 4031 rows, 'C1' \(1\); 'c0' \(1\); .* and 26 more: mend what is a slip", rare)


def test_a_column_that_hardly_tells_tasks_apart_is_remarked_on(tmp_path: Path) -> None:
    many, few = [f"{i},{i},a" for i in range(3)], [f"A,{i},{'ab'[i % 2]}" for i in range(10)]
    (tmp_path / "a.csv").write_text("\n".join(["task,x,y", *many, *few]))
    (remark,) = own(tmp_path / "a.csv").remarks
    assert remark.startswith("3 of 4 tasks of")
    assert remark.endswith("cannot be used: is `task` the column that says whose row it is (`--task`)?")
    (tmp_path / "b.csv").write_text("\n".join(["task,x,y", many[0], *few]))
    assert not own(tmp_path / "b.csv").remarks


def test_a_prediction_file_without_a_column_is_not_asked_for_another_column_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["task,x_1,x_2,y", *(f"A,{i},{i},{'ab'[i % 2]}" for i in range(10))]))
    (tmp_path / "b.csv").write_text("\n".join(["task,x_2,y", *(f"A,{i},{'ab'[i % 2]}" for i in range(10))]))
    schema = own(tmp_path / "a.csv").spec.schema
    with pytest.raises(DataError, match="have no column `x_1`: they have task, x_2, y"):
        Own(OwnOptions(path=str(tmp_path / "b.csv")), Path(), schema)


def test_words_as_targets_of_a_model_that_predicts_numbers_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["task,x,y", *(f"A,{i},{i}.5" for i in range(10))]))
    (tmp_path / "b.csv").write_text("\n".join(["task,x,y", *(f"A,{i},high" for i in range(10))]))
    schema = own(tmp_path / "a.csv").spec.schema
    with pytest.raises(DataError, match=r"the target `y` of '.*' must hold numbers, as it did in training"):
        Own(OwnOptions(path=str(tmp_path / "b.csv")), Path(), schema)


@pytest.mark.parametrize(
    ("sign", "number"), [(",", "0.5"), (";", "0,5"), (";", "0.5"), ("\t", "0.5")], ids=["comma", "semicolon", "point", "tab"]
)
def test_what_stands_between_columns_is_seen_in_the_header(tmp_path: Path, sign: str, number: str) -> None:
    """As spreadsheets write them, of which some begin with a mark and have commas in their numbers."""
    rows = [["task", "age", "note", "y"]] + [
        ["A", f"{i}{number[1:]}", "x, y" if sign == ";" else "x", "ab"[i % 2]] for i in range(10)
    ]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(sign.join(row) for row in rows) + "\n", encoding="utf-8-sig")
    data = own(path)
    assert list(data.table) == ["task", "age", "note", "y"]
    np.testing.assert_array_equal(numbers(data.table, "age"), np.arange(10) + 0.5)
    assert set(categories(usable(data.table, "note")).values) == {"x, y" if sign == ";" else "x"}


@pytest.mark.parametrize("column", ["x", "y"])
def test_empty_and_na_cells_among_numbers_are_missing_values(tmp_path: Path, column: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(mixed(column, ["NA", "", "n/a"]))
    data = own(path)
    assert (data.kind, data.spec.input_shape) == ("regression", (1,))
    assert int(np.isnan(numbers(data.table, column)).sum()) == 3
    parts = data.test_draws("A")[0]
    # Rows without a target are not used, rows without a feature are.
    assert sum(len(part.x) for part in (parts.support, parts.query, parts.test)) == (20 if column == "x" else 17)


def test_a_column_may_be_declared_categorical(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(mixed("x", ["sixty"]))
    assert own(path, categorical="x").spec.input_shape == (22,)  # 20 values, any other, and none
    path.write_bytes(mixed("x", []))
    assert (own(path).spec.input_shape, own(path, categorical="x").spec.input_shape) == ((1,), (22,))
    with pytest.raises(DataError, match="have no column `z`"):
        own(path, categorical="z")


def test_the_type_of_a_column_is_that_of_all_rows_of_a_long_file(tmp_path: Path) -> None:
    # More than pyarrow's first megabyte holds whole numbers only.
    path = tmp_path / "a.csv"
    path.write_text("task,x,y\n" + "A,123456,1.5\n" * 100_000 + "A,0.5,2.5\n")
    assert numbers(read_table(str(path)), "x")[-1] == 0.5


def test_fewer_examples_than_ways_times_shots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`own\.shots` needs 50"):
        own(hospitals(tmp_path), shots=50)


def _png(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, and that holds one row."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * (width + 1))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (_png(20_000, 20_000), "pixels|bomb"),
        (_png(9_000, 9_000), "claims 81000000 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_an_image_that_claims_too_much_or_is_none_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_table(str(tmp_path))


def test_a_schema_of_others_decides_about_classes_columns_and_their_kinds(tmp_path: Path) -> None:
    first = own(hospitals(tmp_path))
    rows = [f"Z,{i}.5,{i % 2},a" for i in range(12)]  # one class, and a text column that looks like numbers
    (tmp_path / "z.csv").write_text("\n".join(["task,age,sex,y", *rows]))
    options = OwnOptions(path=str(tmp_path / "z.csv"))
    with pytest.raises(DataError, match="at least two classes"):
        Own(options, Path())
    second = Own(options, Path(), first.spec.schema)
    assert second.spec == first.spec
    (tmp_path / "z.csv").write_text("task,age,sex,y\nZ,old,x,a\nZ,young,x,b")
    with pytest.raises(DataError, match=r"the column `age` of .* must hold numbers, as it did in training, got text"):
        Own(options, Path(), first.spec.schema)
