"""Reading a user's own file into named columns: .npz, .csv, .parquet, .jsonl, a folder of images, or "module:function".

Reading is pyarrow's, pillow's and NumPy's; what stands here are the limits. Nothing is unpickled, and sizes that a header
claims are checked before memory is taken. Whatever is wrong with a file raises DataError, never anything else.
"""

import json
import re
import warnings
import zipfile
from codecs import getincrementaldecoder
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from common.errors import DataError, QuickbloomError, in_one_line
from common.extras import needs
from common.files import check_name
from common.own_code import import_own

Array = np.ndarray[Any, Any]
Table = dict[str, Array]
"""Columns of equal length: float64 (missing: NaN) or objects (text; missing: None). `pixels`: [rows, channels, side, side]."""

LIMIT = 2 * 2**30
"""Bytes that a file may have, or claim to have once it is unpacked."""
PIXELS = "pixels"
_MOST_PIXELS = 50_000_000
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
_MISSING = {"", "na", "n/a", "nan", "-nan", "null", "none", "#n/a", "#na"}
"""How files spell a missing value, in small letters."""
_BLOCK = 2**31 - 1
_LONGEST_LINE = 2**20
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")


class MixedColumnError(DataError):
    """A column holds words among numbers: a mistake, or categories that the settings must declare.

    `column`: its name; `found`: what it holds, in words.
    """

    def __init__(self, column: str, row: int, word: str, advice: str) -> None:
        cell = f"'{word[:80]}'"
        self.column = column
        self.found = f"the column `{column}` holds numbers, but row {row} (without the header) holds the text {cell}"
        super().__init__(f"{self.found}: put a number there, leave it empty, or {advice}", cell)


def read_table(path: str, image_side: int = 28) -> Table:
    """The columns of `path`. Images become grey [1, side, side] in 0..1, with the columns `class` and `task`."""
    try:
        table = _read(path, image_side)
    except QuickbloomError:
        raise
    except (Exception, SystemExit) as error:  # readers of damaged files raise a dozen types, and a user's function any
        reason = in_one_line(error)
        raise DataError(f"the data '{path}' cannot be read ({reason}): check the file, or write it anew", reason) from error
    lengths = {name: len(column) for name, column in table.items()}
    if not lengths or max(lengths.values()) == 0:
        raise DataError(f"the data '{path}' hold no rows: at least one task with a few examples is needed")
    if len(set(lengths.values())) > 1:
        raise DataError(f"the columns of '{path}' must have the same number of rows, got {lengths}")
    return table


def _read(path: str, image_side: int) -> Table:
    file = Path(path).expanduser()
    if not file.exists():
        if ":" in path:
            return _from_function(path)
        raise DataError(f"the data '{path}' do not exist: name a file, a folder of images, or module:function")
    if file.is_dir():
        return _images(file, image_side)
    readers: dict[str, Callable[[Path], Table]] = {".npz": _npz, ".csv": _csv, ".parquet": _parquet, ".jsonl": _jsonl}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"the data '{path}' must end in {', '.join(readers)}, be a folder of images, or module:function")
    size = file.stat().st_size
    if size == 0:
        raise DataError(f"the data file '{path}' is empty: write it anew")
    _check_size(path, size)
    return reader(file)


def _check_size(path: object, claimed: int) -> None:
    if claimed > LIMIT:
        raise DataError(
            f"the data '{path}' claim {claimed / 1e9:.1f} GB, at most {LIMIT / 1e9:.1f} GB are read: split or thin them out"
        )


def _npz(path: Path) -> Table:
    columns: Table = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        for member in members:
            name = PurePosixPath(member.filename.replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts or len(name.parts) != 1:
                raise DataError(f"the archive '{path}' holds the path '{member.filename}' outside of itself: write it anew")
        _check_size(path, sum(member.file_size for member in members))
        for member in members:
            # The header first: it is what NumPy would take memory by.
            with archive.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(stream)
            if dtype.hasobject:
                raise DataError(
                    f"the array `{member.filename}` in '{path}' holds pickled objects, which are never loaded: save numbers or "
                    "fixed-width text"
                )
            _check_size(path, prod(shape) * dtype.itemsize)
            if prod(shape) * dtype.itemsize > member.file_size:
                raise DataError(f"the array `{member.filename}` in '{path}' claims more than the file holds: write it anew")
            with archive.open(member) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
            columns |= _columns(member.filename.removesuffix(".npy"), array)
    return columns


def _columns(name: str, array: Array) -> Table:
    """One column for [rows], one for each number of [rows, n] (`x_0`, `x_1`, ..), pixels for [rows, channels, side, side]."""
    if array.ndim == 0:
        raise DataError(f"the array `{name}` must have a row for each example, got a single value")
    if array.ndim in (3, 4):
        return {PIXELS: (array[:, None] if array.ndim == 3 else array).astype(np.float64)}
    if array.ndim == 2:
        return {f"{name}_{i}": _column(array[:, i]) for i in range(array.shape[1])}
    if array.ndim > 4:
        raise DataError(f"the array `{name}` must have at most 4 axes, got {array.ndim}")
    return {name: _column(array)}


def _column(array: Array) -> Array:
    if array.dtype.kind in "biuf":
        return array.astype(np.float64)
    if array.dtype.kind not in "UO":
        raise DataError(f"a column must hold numbers or text, got {array.dtype}")
    return np.array([None if _is_missing(value) else str(value) for value in array], dtype=object)


def _is_missing(value: object) -> bool:
    return value is None or str(value).strip().lower() in _MISSING


def as_numbers(name: str, column: Array, advice: str) -> Array:
    """A text column as float64 [rows] where all its values are numbers, as it came where most are words.

    Where at least half are numbers, a word is taken for a mistake: MixedColumnError with its row and `advice`.
    """
    if column.dtype != object:
        return column
    numbers = np.array([np.nan if value is None else _number_in(value) for value in column], dtype=np.float64)
    words = [row for row, value in enumerate(column) if value is not None and np.isnan(numbers[row])]
    known = sum(value is not None for value in column)
    if 2 * (known - len(words)) < known or not known:
        return column
    if words:
        raise MixedColumnError(name, words[0] + 1, column[words[0]], advice)
    return numbers


def _number_in(text: str) -> float:
    """NaN for a word."""
    try:
        return float("nan" if "_" in text else text)
    except ValueError:
        return float("nan")


def _csv(path: Path) -> Table:
    csv = _of_extra("pyarrow.csv")
    delimiter = _delimiter(path)
    broken: list[Any] = []

    def remember(row: Any) -> str:
        broken.append(row)
        return "error"

    # In one block: the type of a column is guessed from the first block alone, and must be that of all its rows. In one thread:
    # a row that is refused has a number only then.
    reading = csv.ReadOptions(block_size=min(_BLOCK, path.stat().st_size + 1), use_threads=False)
    parsing = csv.ParseOptions(delimiter=delimiter, invalid_row_handler=remember)
    try:
        table = _from_arrow(csv.read_csv(path, reading, parsing, csv.ConvertOptions(strings_can_be_null=True)))
    except Exception as error:
        if not broken:
            raise
        row = broken[0]
        raise DataError(
            f"row {row.number - 1} of '{path}' (without the header) has {row.actual_columns} columns, the header "
            f"{row.expected_columns}: mend or remove it"
        ) from error
    return {name: _without_decimal_commas(column) for name, column in table.items()} if delimiter == ";" else table


def _without_decimal_commas(column: Array) -> Array:
    """A text column with points in its numbers; float64 if it holds nothing else. Columns of any other kind as they are."""
    if column.dtype != object:
        return column
    pointed = [
        value.replace(",", ".") if value is not None and _DECIMAL_COMMA.fullmatch(value.strip()) else value for value in column
    ]
    numbers = np.array([np.nan if value is None else _number_in(value) for value in pointed], dtype=np.float64)
    all_numbers = all(value is None or not np.isnan(number) for value, number in zip(pointed, numbers, strict=True))
    return numbers if all_numbers else np.array(pointed, dtype=object)


def _delimiter(path: Path) -> str:
    """What stands between the columns: of comma, semicolon and tab the one that the header has most often outside of quotes.

    Raises DataError if the file is not in UTF-8.
    """
    with path.open("rb") as file:
        start = file.read(_LONGEST_LINE)
        header = next((line for line in re.split(rb"[\r\n]+", start) if line.strip()), b"")
        ending = b"\n" if b"\n" in start else b"\r"
        file.seek(0)
        decoder, number = getincrementaldecoder("utf-8")(), 1
        try:
            while block := file.read(_LONGEST_LINE):
                decoder.decode(block)
                number += block.count(ending)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            line = number + error.object[: error.start].count(ending)
            raise DataError(
                f"the text of '{path}' is not in UTF-8 (line {line}): save it as UTF-8, which spreadsheets call \"CSV UTF-8\""
            ) from None
    unquoted = re.sub(rb'"[^"]*"', b"", header)
    return max((",", ";", "\t"), key=lambda sign: unquoted.count(sign.encode()))  # the first of equal ones


def _jsonl(path: Path) -> Table:
    """Python's own reader: pyarrow's has crashed, not only failed, on lines that are no objects."""
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise DataError(
                    f"line {number} of '{path}' must be a JSON object, a name and a value for each column, got {line[:40]!r}",
                    repr(line[:40]),
                )
            if row:
                rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _json_column(name, [row.get(name) for row in rows]) for name in names}


def _json_column(name: str, values: list[Any]) -> Array:
    if strange := next((value for value in values if isinstance(value, list | dict)), None):
        raise DataError(
            f"the column `{name}` must hold numbers or text, got a {type(strange).__name__}: leave it out or spread it "
            "over columns"
        )
    if all(value is None or isinstance(value, bool | int | float) for value in values):
        return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)
    return _column(np.array(values, dtype=object))


def _parquet(path: Path) -> Table:
    with path.open("rb") as stream:
        file = _of_extra("pyarrow.parquet").ParquetFile(stream)
        facts = file.metadata
        _check_size(path, sum(facts.row_group(i).total_byte_size for i in range(facts.num_row_groups)))
        _check_size(path, 8 * facts.num_rows * facts.num_columns)
        return _from_arrow(file.read())


def _from_arrow(table: Any) -> Table:
    columns: Table = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name in columns:
            raise DataError(f"the column `{name}` stands twice in the data: rename one")
        kind = str(column.type)
        if kind.startswith(("int", "uint", "float", "double", "bool", "null", "halffloat")):
            columns[name] = column.cast("float64", safe=False).to_numpy().astype(np.float64)
        elif kind.startswith(("list", "struct", "map", "binary")):
            raise DataError(
                f"the column `{name}` must hold numbers or text, got {kind}: leave it out or spread it over columns"
            )
        else:
            columns[name] = _column(np.array(column.to_pylist(), dtype=object))
    return columns


def _images(folder: Path, side: int) -> Table:
    """folder/TASK/CLASS/image, or folder/CLASS/image for a single task `all`."""
    with warnings.catch_warnings(action="ignore"):  # pillow's remarks; what it would warn of as too large is refused below
        return _read_images(_of_extra("PIL.Image"), folder, side)


def _read_images(image_module: Any, folder: Path, side: int) -> Table:
    pixels, classes, tasks = [], [], []
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES and path.is_file())
    _check_size(folder, len(files) * side * side * np.dtype(np.float64).itemsize)
    for file in files:
        check_name("the file or folder", str(file.relative_to(folder)), DataError)
        parts = file.relative_to(folder).parts
        if len(parts) not in (2, 3):
            raise DataError(f"the image '{file}' must lie in '{folder}' as CLASS/image or as TASK/CLASS/image", str(file))
        try:
            # Other formats start other programs (EPS), whatever the name of the file says.
            with image_module.open(file, formats=_FORMATS) as image:
                if prod(image.size) > _MOST_PIXELS:
                    raise DataError(
                        f"the image '{file}' claims {prod(image.size)} pixels, at most {_MOST_PIXELS} are read", str(file)
                    )
                pixels.append(np.asarray(image.convert("L").resize((side, side)), dtype=np.float64)[None] / 255)
        except DataError:
            raise
        except Exception as error:  # pillow raises a dozen types for damaged images
            reason = in_one_line(error)
            raise DataError(f"the image '{file}' cannot be read ({reason}): remove or replace it", reason, str(file)) from error
        classes.append(parts[-2])
        tasks.append(parts[0] if len(parts) == 3 else "all")
    if not pixels:
        raise DataError(f"the folder '{folder}' holds no images as CLASS/image or TASK/CLASS/image")
    return {PIXELS: np.stack(pixels), "class": np.array(classes, object), "task": np.array(tasks, object)}


def _from_function(name: str) -> Table:
    module, _, attribute = name.partition(":")
    found: object = getattr(import_own(module), attribute)
    returned = found() if callable(found) else None
    if not isinstance(returned, Mapping):
        raise DataError(f"the data '{name}' must name a function without arguments that returns a dictionary of arrays")
    columns: Table = {}
    for key, value in returned.items():
        columns |= _columns(str(key), np.asarray(value))
    return columns


def _of_extra(module: str) -> Any:
    return needs("datasets", module, "this kind of data", instead=", or use .npz", error=DataError)
