"""Whatever a file holds, a user reads one sentence: every reader against damaged and made-up inputs.

QUICKBLOOM_FUZZ: how many inputs each reader gets.
"""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quickbloom.client_app.check_data import describe
from quickbloom.common.errors import QuickbloomError

FUZZ = int(os.environ.get("QUICKBLOOM_FUZZ", "60"))
fuzz = settings(max_examples=FUZZ, deadline=None, suppress_health_check=list(HealthCheck))

VALID: dict[str, list[Any]] = {
    "task": ["A", "B"] * 9,
    "x": [float(i) for i in range(18)],
    "sex": [None, "m", "f"] * 6,
    "y": ["a", "a", "b", "b", "a", "b"] * 3,
}
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["set", "cut", "put", "drop", "twice"]), st.binary(max_size=8)), max_size=6
)
SPELLED = "1,234|1.234,5|1 234|(5.00 €)|$5|5.3%|-|2024-01-31|31.1.2024|3/4/2024|2024-01-31T10:30Z|10:30 pm|True|0401|none|a"
CELLS = st.one_of(
    st.text(max_size=6),
    st.floats().map(str),
    st.integers().map(str),
    st.sampled_from(["", "NA", "inf", "1e400", *SPELLED.split("|")]),
)
NAMES = st.sampled_from(["task", "x", "sex", "y", "target", "label", "", "x,y", "é", "x\n"])


def damaged(content: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    """Bytes set, put in, cut out or doubled, or the end dropped, at relative places."""
    for place, what, value in edits:
        at = int(place * len(content))
        if what == "set":
            content = content[:at] + value + content[at + len(value) :]
        elif what == "put":
            content = content[:at] + value + content[at:]
        elif what == "cut":
            content = content[:at] + content[at + 1 + len(value) :]
        elif what == "drop":
            content = content[:at]
        else:
            content = content[: at + 40] + content[at:]
    return content


def survives(path: str | Path, target: str = "y") -> bool:
    """Whether the data can be used; anything but one sentence is an error of this test."""
    try:
        for line in describe(str(path), "task", target):
            assert line
        return True
    except QuickbloomError as error:
        sentence = str(error)
    assert "\n" not in sentence
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def csv_of(table: dict[str, list[Any]]) -> bytes:
    rows = zip(*table.values(), strict=True)
    return "\n".join([",".join(table), *(",".join("" if v is None else str(v) for v in row) for row in rows)]).encode()


def jsonl_of(table: dict[str, list[Any]]) -> bytes:
    rows = zip(*table.values(), strict=True)
    return "\n".join(json.dumps(dict(zip(table, row, strict=True))) for row in rows).encode()


def npz_of(table: dict[str, list[Any]]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: np.array(["" if v is None else v for v in values]) for name, values in table.items()})  # type: ignore[arg-type]
    return file.getvalue()


def parquet_of(table: dict[str, list[Any]]) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(pa.table(table), file)
    return file.getvalue()


WRITERS: dict[str, Callable[[dict[str, list[Any]]], bytes]] = {
    "csv": csv_of,
    "jsonl": jsonl_of,
    "npz": npz_of,
    "parquet": parquet_of,
}


@pytest.mark.parametrize("kind", list(WRITERS))
def test_the_undamaged_file_can_be_used(folder: Path, kind: str) -> None:
    (folder / f"valid.{kind}").write_bytes(WRITERS[kind](VALID))
    assert survives(folder / f"valid.{kind}")


@pytest.mark.parametrize("kind", list(WRITERS))
def test_a_damaged_file_is_one_sentence(folder: Path, kind: str) -> None:
    valid, refused = WRITERS[kind](VALID), []

    @fuzz
    @given(EDITS)
    def run(edits: list[tuple[float, str, bytes]]) -> None:
        path = folder / f"damaged.{kind}"
        path.write_bytes(damaged(valid, edits))
        refused.append(not survives(path))

    run()
    assert any(refused)
    assert not all(refused)


@fuzz
@given(
    st.lists(NAMES, min_size=1, max_size=5),
    st.lists(st.lists(CELLS, max_size=5), max_size=12),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_any_table_as_csv_is_one_sentence_or_usable(folder: Path, names: list[str], rows: list[list[str]], end: str) -> None:
    (folder / "made.csv").write_bytes(end.join([",".join(names), *(",".join(row) for row in rows)]).encode(errors="replace"))
    survives(folder / "made.csv")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda part: st.one_of(st.lists(part, max_size=3), st.dictionaries(NAMES, part, max_size=3)),
    max_leaves=6,
)


@fuzz
@given(st.lists(st.one_of(st.dictionaries(NAMES, JSON, max_size=5), JSON), max_size=8))
def test_any_lines_of_json_are_one_sentence_or_usable(folder: Path, lines: list[Any]) -> None:
    (folder / "made.jsonl").write_text("\n".join(map(json.dumps, lines)), errors="replace")
    survives(folder / "made.jsonl")


@fuzz
@given(st.dictionaries(NAMES, st.lists(JSON, min_size=6, max_size=6), min_size=1, max_size=4), st.data())
def test_any_parquet_columns_are_one_sentence_or_usable(
    folder: Path, columns: dict[str, list[Any]], data: st.DataObject
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    simple = [pa.int8(), pa.uint64(), pa.float16(), pa.bool_(), pa.string(), pa.date32(), pa.timestamp("ns"), pa.time64("us")]
    simple += [
        pa.decimal128(20, 3),
        pa.duration("s"),
        pa.binary(),
        pa.large_list(pa.int8()),
        pa.timestamp("s", "UTC"),
        pa.null(),
    ]
    made = {"task": pa.array(["A", "B"] * 3), "y": pa.array(["a", "b", "a"] * 2)}
    for name, values in columns.items():
        kind = data.draw(st.sampled_from([None, *simple]))
        with suppress(pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
            column = pa.array(values, kind, safe=False)
            made[name] = column.dictionary_encode() if data.draw(st.booleans()) and kind in (pa.string(), pa.int8()) else column
    try:
        pq.write_table(pa.table(made), folder / "typed.parquet")
    except pa.ArrowException:  # not every type can be written
        return
    survives(folder / "typed.parquet")


SCALARS = st.one_of(
    arrays.boolean_dtypes(),
    arrays.integer_dtypes(),
    arrays.floating_dtypes(sizes=(16, 32, 64)),
    arrays.unicode_string_dtypes(max_len=4),
)
ARRAYS = st.one_of(
    arrays.arrays(
        st.one_of(SCALARS, arrays.complex_number_dtypes(), arrays.datetime64_dtypes()),
        arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6),
    ),
    arrays.arrays(SCALARS, 12),
    st.just(np.array(VALID["task"])),
    st.just(np.array(VALID["y"])),
)


@fuzz
@given(st.dictionaries(st.sampled_from(list(VALID)), ARRAYS, max_size=4))
def test_any_arrays_as_npz_are_one_sentence_or_usable(folder: Path, table: dict[str, np.ndarray[Any, Any]]) -> None:
    np.savez(folder / "made.npz", allow_pickle=False, **table)
    survives(folder / "made.npz")


@fuzz
@given(st.dictionaries(NAMES, st.one_of(JSON, ARRAYS, st.lists(CELLS, max_size=6)), max_size=5) | JSON)
def test_whatever_a_function_returns_is_one_sentence_or_usable(returned: Any) -> None:
    module = ModuleType("fuzzed_data")
    module.load = lambda: returned  # type: ignore[attr-defined]
    sys.modules["fuzzed_data"] = module
    try:
        survives("fuzzed_data:load")
    finally:
        del sys.modules["fuzzed_data"]


@pytest.mark.parametrize("error", [ValueError("x\ny"), SystemExit(3), MemoryError(), RecursionError("deep"), KeyError("k")])
def test_whatever_a_function_raises_is_one_sentence(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise error

    module = ModuleType("fuzzed_data")
    module.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fuzzed_data", module)
    assert not survives("fuzzed_data:load")


IMAGES = arrays.arrays(
    st.one_of(
        arrays.boolean_dtypes(),
        arrays.integer_dtypes(),
        arrays.unsigned_integer_dtypes(),
        arrays.floating_dtypes(sizes=(16, 32, 64)),
    ),
    st.tuples(st.just(18), *[st.sampled_from([1, 2, 3, 4, 8, 9])] * 3)
    | st.tuples(st.just(18), *[st.sampled_from([1, 3, 8])] * 2),
    fill=st.sampled_from([0, 1]),
)


@fuzz
@given(st.dictionaries(st.sampled_from(["image", "mask", "pixels", "y"]), IMAGES, min_size=1, max_size=2))
def test_any_images_as_npz_are_one_sentence_or_usable(folder: Path, images: dict[str, np.ndarray[Any, Any]]) -> None:
    columns = {"task": np.array(VALID["task"]), "y": np.array(VALID["y"])}
    np.savez(folder / "images.npz", allow_pickle=False, **{**columns, **images})
    survives(folder / "images.npz")


PLACES = [
    "A/cat/1",
    "A/cat/2",
    "A/dog/1",
    "A/dog/2",
    "B/cat/1",
    "cat/1",
    "1",
    "A/b/c/1",
    "A/.cat/1",
    "__MACOSX/A/1",
    "A/cat/._1",
]
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "ICO", "TGA", "PCX", "SGI", "QOI", "AVIF"]
MODES = ["1", "L", "RGB", "P", "RGBA", "LA", "I;16", "I", "F", "CMYK", "YCbCr", "LAB"]
SUFFIXES = ["", ".tif", ".jpg", ".PNG", ".tga", ".ico", ".heic", ".txt", ".pgm"]


def picture(form: str, mode: str, orientation: int) -> bytes:
    """An image of nearly any kind; of a mode that the format has not, one that it has."""
    image = pytest.importorskip("PIL.Image")
    exif, content = image.Exif(), io.BytesIO()
    exif[274] = orientation
    plain = image.new("RGB", (9, 7), (200, 30, 90))
    try:
        wide = image.fromarray(np.full((7, 9), 40000, np.uint16)) if mode.startswith("I") else plain
        wide.convert(mode).save(content, form, exif=exif)
    except (OSError, ValueError, KeyError):
        content = io.BytesIO()
        plain.save(content, form if form in image.SAVE else "PNG")
    return content.getvalue()


@fuzz
@given(
    st.lists(
        st.tuples(
            st.sampled_from(PLACES),
            st.sampled_from(SUFFIXES),
            st.builds(picture, st.sampled_from(FORMATS), st.sampled_from(MODES), st.integers(0, 9)),
            EDITS,
        ),
        max_size=6,
    )
)
def test_any_folder_of_images_is_one_sentence_or_usable(folder: Path, files: list[tuple[str, str, bytes, Any]]) -> None:
    root = folder / "images"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, suffix, content, edits in files:
        path = root / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damaged(content, edits))
    survives(root, "class")
