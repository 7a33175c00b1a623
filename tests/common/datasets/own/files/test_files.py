"""Headers and containers: what spreadsheets and programs put round a table is understood, or refused in one sentence."""

import json
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.columns import Reading, categories, find_kind, of_kind, usable
from quickbloom.common.datasets.own.files.parquet_file import Unusable
from quickbloom.common.datasets.own.files.tables import LIMIT, Table, read_table
from quickbloom.common.datasets.own.options import listed, quoted
from quickbloom.common.errors import DataError

ROWS = [f"A,{i}.5,{'ab'[i % 2]}" for i in range(10)]


def own(path: Path, **options: object) -> Own:
    return Own(OwnOptions.model_validate({"path": str(path), **options}), Path())


def written(tmp_path: Path, content: str | bytes, name: str = "f.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "task, x, y\n" + "\n".join(row.replace(",", ", ") for row in ROWS),
        " task ,x , y \n" + "\n".join(row.replace(",", " ,") for row in ROWS),
        "\ufefftask,x,y\n" + "\n".join(ROWS),
        "sep=;\ntask;x;y\n" + "\n".join(row.replace(",", ";") for row in ROWS),
        "\ufeffsep=,\r\ntask,x,y\r\n" + "\r\n".join(ROWS),
        "sep=|\ntask|x|y\n" + "\n".join(row.replace(",", "|") for row in ROWS),
        "# from the ward, 2024\n# second\ntask,x,y\n" + "\n".join(ROWS),
        "\n# a comment\n\ntask,x,y\n\n" + "\n\n".join(ROWS) + "\n\n",
        "#task\tx\ty\n" + "\n".join(row.replace(",", "\t") for row in ROWS),
        "task,x,y,\n" + "\n".join(f"{row}," for row in ROWS),
        '"task","x","y"\n' + "\n".join(f'"{row}"'.replace(",", '", "') for row in ROWS),
        ",task,x,y\n" + "\n".join(f"{i},{row}" for i, row in enumerate(ROWS)),
        "Unnamed: 0,task,x,y\n" + "\n".join(f"{i + 7},{row}" for i, row in enumerate(ROWS)),
        "Unnamed: 0.1,Unnamed: 0,task,x,y\n" + "\n".join(f"{i},{i // 3},{row}" for i, row in enumerate(ROWS)),
        ",task,x,y\n" + "\n".join(f"{i % 5},{row}" for i, row in enumerate(ROWS)),
        "task,x,y,,,\n" + "\n".join(f"{row},,," for row in ROWS),
        "task,x,,y,,\n" + "\n".join(f"{row[:-2]},,{row[-1]},," for row in ROWS),
        "sep=;;;\ntask;x;y\n" + "\n".join(row.replace(",", ";") for row in ROWS),
        '"sep=;"\n# of the ward\ntask;x;y\n' + "\n".join(row.replace(",", ";") for row in ROWS),
        "\ufeff\u200btask,x,y\u2060\n" + "\n".join(ROWS),
        "task,x,y\n" + "\n".join(ROWS).replace(",a", ',="a"'),
    ],
    ids=["blanks", "more blanks", "mark", "sep", "mark and sep", "other sep", "comments", "empty lines", "header with #",
         "trailing", "quoted", "index", "named index", "two indexes", "joined", "many trailing", "empty columns", "long sep",
         "quoted sep and comment", "no width", "formula"],
)  # fmt: skip
def test_what_stands_round_a_csv_table_is_understood(tmp_path: Path, content: str) -> None:
    data = own(written(tmp_path, content))
    assert list(data.table) == ["task", "x", "y"]
    assert data.schema.features == {"x": "number"}
    np.testing.assert_array_equal(of_kind(data.table, "x", "number", Reading("")), np.arange(10) + 0.5)
    assert categories(usable(data.table, "y")).cells() == list("ab") * 5


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("task,x,y\nA,1,a\nA,2,b,\nA,3,c,d\n", r"row 3 of '.*' \(without the header\) has 4 columns, the header 3"),
        ('task,x,y\nA,"1,a\nA,2,b\n', "cannot be read near line 3 .*: is a quotation mark missing"),
        ("task,x, x\nA,1,2\n", "the column `x` stands twice"),
        ("task,,y\nA,1,a\n", "column 2 of '.*' has no name in the header"),
        (",x,y\nA,1,a\nA,2,b\n", "the first column has no name in the header"),
    ],
)
def test_what_cannot_be_a_table_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        own(written(tmp_path, content))


def test_names_are_compared_as_they_look(tmp_path: Path) -> None:
    rows = "\n".join(f"A,{i},{'ab'[i % 2]}" for i in range(10))
    data = own(written(tmp_path, f"klinik,gro\u0308\u00dfe,ergebnis_a\u0308\n{rows}"), **{
        "task-column": "klinik", "target-column": "ergebnis_\u00e4", "features": "gr\u00f6\u00dfe",
    })  # fmt: skip
    assert list(data.schema.features) == ["gr\u00f6\u00dfe"]


def test_names_with_commas_are_quoted_or_recognised(tmp_path: Path) -> None:
    header = '"Weight, kg","Height, cm",task,answer'
    rows = [f'{i}.5,{i},A,"{("yes, a lot", "no, never")[i % 2]}"' for i in range(10)]
    path = written(tmp_path, "\n".join([header, *rows]))
    for features in ("Weight, kg,Height, cm", '"Weight, kg","Height, cm"', "Weight, kg , Height, cm"):
        assert list(own(path, **{"target-column": "answer", "features": features}).schema.features) == [
            "Weight, kg",
            "Height, cm",
        ]
    data = own(path, **{"target-column": "answer", "classes": "yes, a lot,no, never"})
    assert data.classes == ["yes, a lot", "no, never"]
    assert listed(quoted(data.classes)) == data.classes


def test_json_lines_keep_long_numbers_and_may_begin_with_a_mark(tmp_path: Path) -> None:
    ids = [1583715738627261037, 1583715738627261038]
    rows = [{"task": ids[i % 2], "x": i / 2, "y": "ab"[i // 2 % 2], "more": [[], [1]][i % 2]} for i in range(20)]
    path = written(tmp_path, "\ufeff" + "\n".join(map(json.dumps, rows)), "f.jsonl")
    assert list(own(path, features="x").rows) == [str(name) for name in ids]
    with pytest.raises(DataError, match="the column `more` must hold numbers or text, got a list: leave it out"):
        own(path)
    with pytest.raises(DataError, match=r"line 1 of '.*' is no JSON \(the name 'x' stands twice\)"):
        own(written(tmp_path, '{"x": 1, "x": 2}\n', "f.jsonl"))
    with pytest.raises(DataError, match=r"line 2 of '.*' is no JSON"):
        own(written(tmp_path, '{"task": 1}\n{"task": \n', "f.jsonl"))


def parquet(path: Path, **columns: Any) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"task": ["A"] * 10, "y": list("ab") * 5, **columns}), path)
    return path


def arrow(values: list[Any], make: Callable[[Any], Any]) -> Any:
    pa = pytest.importorskip("pyarrow")
    return pa.array(values, make(pa))


NESTED: dict[str, tuple[list[Any], Callable[[Any], Any]]] = {
    "list": ([[1.0, 2.0]] * 10, lambda pa: pa.list_(pa.float32())),
    "large list": ([[1.0]] * 10, lambda pa: pa.large_list(pa.float32())),
    "fixed list": ([[1.0, 2.0]] * 10, lambda pa: pa.list_(pa.float32(), 2)),
    "struct": ([{"a": 1}] * 10, lambda pa: pa.struct([("a", pa.int64())])),
    "map": ([[("a", 1)]] * 10, lambda pa: pa.map_(pa.string(), pa.int64())),
    "binary": ([b"x"] * 10, lambda pa: pa.binary()),
    "large binary": ([b"x"] * 10, lambda pa: pa.large_binary()),
    "fixed binary": ([b"xy"] * 10, lambda pa: pa.binary(2)),
}


@pytest.mark.parametrize("kind", list(NESTED))
def test_parquet_columns_that_are_no_numbers_are_refused_only_where_they_are_used(tmp_path: Path, kind: str) -> None:
    path = parquet(tmp_path / "f.parquet", x=np.arange(10.0), more=arrow(*NESTED[kind]))
    assert isinstance(read_table(str(path))["more"], Unusable)
    with pytest.raises(
        DataError, match=r"the column `more` must hold numbers or text, got .*: leave it out with `own.features`"
    ):
        own(path)
    assert own(path, features="x").schema.features == {"x": "number"}


DAY, MOMENT = date(2024, 3, 31), datetime(2024, 3, 31)
TYPED: dict[str, tuple[list[Any], Callable[[Any], Any], str, float]] = {
    "int8": ([3], lambda pa: pa.int8(), "number", 3),
    "int64 with none": ([3, None], lambda pa: pa.int64(), "number", 3),
    "half": ([0.5], lambda pa: pa.float16(), "number", 0.5),
    "decimal": ([Decimal("1.25")], lambda pa: pa.decimal128(10, 2), "number", 1.25),
    "bool": ([True, False], lambda pa: pa.bool_(), "number", 1),
    "words": (["u", "v"], lambda pa: pa.dictionary(pa.int8(), pa.string()), "text", 0),
    "numbers by code": ([7, 7], lambda pa: pa.dictionary(pa.int8(), pa.int64()), "number", 7),
    "large text": (["u"], lambda pa: pa.large_string(), "text", 0),
    "date": ([DAY], lambda pa: pa.date32(), "date", 19813),
    "date64": ([DAY], lambda pa: pa.date64(), "date", 19813),
    "second": ([MOMENT, None], lambda pa: pa.timestamp("s"), "date", 19813),
    "nanosecond": ([MOMENT], lambda pa: pa.timestamp("ns"), "date", 19813),
    "zone": ([MOMENT], lambda pa: pa.timestamp("us", "Europe/Berlin"), "date", 19813),
    "time": ([time(10, 30)], lambda pa: pa.time32("s"), "time", 10.5),
    "time64": ([time(10, 30)], lambda pa: pa.time64("us"), "time", 10.5),
    "time of nanoseconds": ([time(10, 30)], lambda pa: pa.time64("ns"), "time", 10.5),
    "uuid": ([UUID(int=7).bytes], lambda pa: pa.uuid(), "text", 0),
    "duration": ([timedelta(hours=36)], lambda pa: pa.duration("ms"), "number", 1.5),
    "nothing": ([None], lambda pa: pa.null(), "", float("nan")),
}


@pytest.mark.parametrize("kind", list(TYPED))
def test_parquet_types_are_what_they_say(tmp_path: Path, kind: str) -> None:
    values, make, expected, number = TYPED[kind]
    table = read_table(str(parquet(tmp_path / "f.parquet", x=arrow((values * 10)[:10], make))))
    assert find_kind(table, "x", Reading("")) == expected
    if expected != "text":
        assert of_kind(table, "x", expected, Reading(""))[0] == pytest.approx(number, nan_ok=True)  # type: ignore[index]


def test_the_index_of_a_data_frame_is_no_input(tmp_path: Path) -> None:
    path = parquet(tmp_path / "f.parquet", x=np.arange(10.0), __index_level_0__=np.arange(5, 15))
    data = own(path)
    assert list(data.schema.features) == ["x"]
    assert any("numbers of rows (pandas' index)" in remark for remark in data.remarks)


def test_a_small_file_that_expands_to_gigabytes_is_refused_without_taking_them(tmp_path: Path) -> None:
    """One word of 1 MB, and 3,000 rows that name it."""
    pa = pytest.importorskip("pyarrow")
    word = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * 2**20]))
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"task": ["A"] * 3000, "y": ["a", "b"] * 1500, "x": word}), path)
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=rf"claim 3.1 GB, at most {LIMIT / 1e9:.1f} GB are read"):
        own(path)


@pytest.mark.parametrize("kind", ["csv", "npz", "parquet", "jsonl"])
def test_the_same_table_is_the_same_tasks_in_every_container(tmp_path: Path, kind: str) -> None:
    """Ids of 19 digits, a category of digits with a leading 0, truths, a date and a missing number."""
    ids = [1583715738627261037 + i % 3 for i in range(30)]
    codes, truths = [("0401", "401")[i % 2] for i in range(30)], [bool(i % 4) for i in range(30)]
    x, y = [i / 4 if i % 7 else None for i in range(30)], ["ill" if i % 5 < 2 else "well" for i in range(30)]
    at = [f"2024-03-{1 + i % 28:02d}" for i in range(30)]
    columns: dict[str, list[Any]] = {"task": ids, "code": codes, "truth": truths, "x": x, "y": y, "at": at}
    path = tmp_path / f"f.{kind}"
    if kind == "csv":
        rows = (["" if value is None else str(value) for value in row] for row in zip(*columns.values(), strict=True))
        path.write_text("\n".join([",".join(columns), *map(",".join, rows)]))
    elif kind == "jsonl":
        path.write_text(
            "\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))
        )
    elif kind == "npz":
        arrays = {name: np.array(values, dtype=float if name == "x" else None) for name, values in columns.items()}
        np.savez(path, **(arrays | {"at": arrays["at"].astype("datetime64[D]")}))  # type: ignore[arg-type]
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({**columns, "at": pa.array(map(date.fromisoformat, at))}), path)
    data = own(path, categorical="code,truth", shots=2)
    assert list(data.rows) == sorted({str(name) for name in ids})
    assert data.schema.features == {"at": "date", "code": "text", "truth": "text", "x": "number"}
    reference = _expected(columns, next(iter(data.rows)), data)
    np.testing.assert_allclose(data.test_draws(next(iter(data.rows)))[0].test.x.numpy(), reference, atol=1e-6)


def _expected(columns: dict[str, list[Any]], task: str, data: Own) -> np.ndarray[Any, Any]:
    """The inputs of a task's test rows by hand."""
    support, _, test = (rows.tolist() for rows in data.rows[task])
    days = [date.fromisoformat(value).toordinal() for value in columns["at"]]
    xs = [float("nan") if value is None else value for value in columns["x"]]
    blocks = []
    for numbers in (days, xs):
        known = np.array(numbers, dtype=float)
        scaled = (known[test] - np.nanmean(known[support])) / np.nanstd(known[support])
        blocks.append(np.nan_to_num(np.clip(scaled, -10, 10))[:, None])
    for name in ("code", "truth"):
        keys = data.schema.vocabularies[name]
        order = sorted({str(value) for value in columns[name]}, key=lambda value: keys.index(_key(name, value)))
        hot = [[float(str(columns[name][row]) == value) for value in [*order, None, None]] for row in test]
        blocks.append(np.array(hot))
    return np.concatenate([blocks[0], blocks[2], blocks[3], blocks[1]], axis=1)


def _key(column: str, value: str) -> str:
    from hashlib import blake2b

    return blake2b(f"{column}\x1f{value}".encode(), digest_size=8).hexdigest()


def test_a_table_tells_its_decimal_sign(tmp_path: Path) -> None:
    table: Table = read_table(str(written(tmp_path, "task;x;y\nA;1,5;a\nA;2,25;b\n")))
    assert table.decimal == ","


def test_a_name_on_two_lines_is_one_on_one_line(tmp_path: Path) -> None:
    rows = "\n".join(row.replace(",", ";") for row in ROWS)
    data = own(written(tmp_path, f'"the\r\ntask";"x\n(kg)";y\n{rows}'), **{"task-column": "the task"})
    assert list(data.table) == ["the task", "x (kg)", "y"]
    assert own(data.options.path, **{"task-column": "the\ntask"}).schema.features == {"x (kg)": "number"}  # type: ignore[arg-type]


def test_an_index_that_is_text_is_a_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the first column has no name"):
        own(written(tmp_path, ",task,x,y\n" + "\n".join(f"{i * i % 7},{row}" for i, row in enumerate(ROWS))))
    path = parquet(tmp_path / "f.parquet", __index_level_0__=[f"p{i % 2}" for i in range(10)])
    assert own(path).schema.features == {"__index_level_0__": "text"}


def npz(path: Path, **columns: Any) -> Path:
    np.savez(path, **{"task": np.array(["A"] * 10), "y": np.array(list("ab") * 5), **columns})
    return path


def test_arrays_of_bytes_are_text_and_what_is_neither_is_refused_where_it_is_used(tmp_path: Path) -> None:
    path = npz(tmp_path / "f.npz", x=np.array(["M", "F"] * 5).astype("S"), y=np.array(list("ab") * 5).astype("S"))
    data = own(path)
    assert data.classes == ["a", "b"]
    assert categories(usable(data.table, "x")).cells() == ["M", "F"] * 5
    for more in (np.arange(10) * 1j, np.zeros(10, dtype="V4"), np.array([b"\xff"] * 10)):
        path = npz(tmp_path / "f.npz", x=np.arange(10.0), more=more)
        assert own(path, features="x").schema.features == {"x": "number"}
        with pytest.raises(DataError, match=r"the column `more` must hold numbers or text, got .*: leave it out"):
            own(path)


def test_what_a_function_masks_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "masked_columns.py").write_text(
        "import numpy as np\n"
        "def load():\n"
        "    gone = [i == 3 for i in range(10)]\n"
        "    return {'task': ['A'] * 10, 'y': list('ab') * 5, 'x': np.ma.masked_array(np.arange(10), gone),\n"
        "            'z': np.ma.masked_array(np.arange(10) / 4, gone), 'w': [b'M', None] * 5, 'd': [{}] * 10}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    table = read_table("masked_columns:load")
    for name, factor in (("x", 1), ("z", 4)):
        expected = [np.nan if i == 3 else i / factor for i in range(10)]
        np.testing.assert_array_equal(of_kind(table, name, "number", Reading("")), expected)
    assert categories(usable(table, "w")).cells() == ["M", None] * 5
    assert isinstance(table["d"], Unusable)
