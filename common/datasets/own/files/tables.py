"""Reads a user's own file into named columns: .npz, .csv, .csv.gz, .parquet, .jsonl, a folder of images, "module:function".

Python, pyarrow, pillow and NumPy do the reading; this module sets the limits. Nothing is unpickled,
and sizes claimed by a header are checked before memory is allocated. Any flaw of a file raises
DataError, and no other exception.
"""

import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from quickbloom.common.datasets.own.files.csv_file import PACKED, read_csv
from quickbloom.common.datasets.own.files.parquet_file import Column, Unusable, not_usable, read_parquet
from quickbloom.common.datasets.own.files.pictures import Pictures
from quickbloom.common.datasets.own.numbers import decimal_sign
from quickbloom.common.datasets.own.text import Array, Text, as_name, as_text
from quickbloom.common.errors import DataError, QuickbloomError, as_told, in_one_line
from quickbloom.common.system.extras import needs
from quickbloom.common.system.user_code import import_own

LIMIT = 2 * 2**30
"""Largest file in bytes, and largest claimed size once unpacked."""
_INDEX = re.compile(r"|Unnamed: 0(\.[0-9]+)*|__index_level_[0-9]+__")
"""Pandas' names for a column that was the index of a table, written and read any number of times."""
PIXELS = "pixels"
"""Name of the column of images, whatever the name of its array."""


class Table(dict[str, Column]):
    """Columns of equal length, as the file has them: numbers, dates or truth values of any width, `Text`, or `Unusable`.

    Arrays of images are unchanged until `choose_images` makes one of them `PIXELS`. `remarks`:
    sentences on what was converted or skipped. `decimal`: decimal sign of numbers written as text;
    "" if the columns disagree. `path`: the source. `files`: of a folder of images, where each row comes from.
    """

    path = ""
    files: Sequence[str] = ()

    def __init__(self, columns: Mapping[str, Column], delimiter: str = ",") -> None:
        super().__init__(columns)
        self.remarks: list[str] = []
        texts = [column for column in columns.values() if isinstance(column, Text)]
        self.decimal = decimal_sign(texts, "," if delimiter == ";" else ".")

    @property
    def rows(self) -> int:
        """Number of rows of every column."""
        return len(next(iter(self.values())))


def read_table(path: str, image_side: int = 28) -> Table:
    """Return the columns of `path`. Images become grey [1, side, side] in 0..1, with columns `class` and `task`.

    `image_side`: pixels of images in a folder, each way; 0: `Pictures` for an encoder.

    Raises DataError.
    """
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
    _drop_index(table)
    table.path = path
    return table


def _drop_index(table: Table) -> None:
    """Remove row numbers that pandas writes as a column, since they say nothing about new rows. Raises DataError."""
    for name in [name for name in table if _INDEX.fullmatch(name)]:
        column = table[name]
        if (
            not isinstance(column, Unusable | Pictures)
            and column.ndim == 1
            and _numbers_rows(as_text(column), any_order=bool(name))
        ):
            del table[name]
            what = f"the column `{name}`" if name else "the first column, which has no name,"
            table.remarks.append(f"{what} holds the numbers of rows (pandas' index) and is left out")
        elif not name:
            raise DataError("the first column has no name in the header: give it one")


def _numbers_rows(text: Text, *, any_order: bool) -> bool:
    """Return whether a column holds row numbers: distinct integers, or, in joined tables, runs that start again.

    `any_order`: its name marks an index, so rows may be missing or reordered.
    """
    if (text.codes < 0).any() or not all(re.fullmatch(r"-?[0-9]{1,15}", value) for value in text.values):
        return False
    steps = np.diff(text.spread(np.array(text.values, dtype=np.int64), 0))
    return any_order or len(text.values) == len(text) or bool(((steps == 1) | (steps < 0)).all())


def _read(path: str, image_side: int) -> Table:
    file = Path(path).expanduser()
    if not file.exists():
        if ":" in path:
            return _from_function(path)
        raise DataError(f"the data '{path}' do not exist: name a file, a folder of images, or module:function")
    if file.is_dir():
        return _images(file, image_side)
    readers: dict[str, Callable[[Path], Table]] = {".npz": _npz, ".csv": _csv, PACKED: _csv}
    readers |= {".parquet": _parquet, ".jsonl": _jsonl}
    reader = readers.get(PACKED if file.name.lower().endswith(PACKED) else file.suffix.lower())
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


def _csv(path: Path) -> Table:
    columns, delimiter = read_csv(path, LIMIT)
    return Table(columns, delimiter)


def _parquet(path: Path) -> Table:
    _of_extra("pyarrow.parquet")
    return Table(read_parquet(path, _check_size))


def _npz(path: Path) -> Table:
    columns: dict[str, Column] = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        for member in members:
            name = PurePosixPath(member.filename.replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts or len(name.parts) != 1:
                raise DataError(f"the archive '{path}' holds the path '{member.filename}' outside of itself: write it anew")
        _check_size(path, sum(member.file_size for member in members))
        for member in members:
            # Check the header first, since NumPy allocates memory by it.
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
            _add(columns, _columns(as_name(member.filename.removesuffix(".npy")), array))
    return Table(columns)


def _add(columns: dict[str, Column], more: dict[str, Column]) -> None:
    """Add columns. Raises DataError if a name exists already."""
    if twice := sorted(set(columns) & set(more)):
        raise DataError(f"the column `{twice[0]}` stands twice in the data: rename one")
    columns |= more


def _columns(name: str, array: Array) -> dict[str, Column]:
    """Return one column for [rows], and one per number for [rows, n] (`x_0`, `x_1`, ..); images stay whole."""
    if array.ndim == 0:
        raise DataError(f"the array `{name}` must have a row for each example, got a single value")
    if array.ndim in (3, 4):
        return {name: array}
    if array.ndim == 2:
        return {f"{name}_{i}": _column(f"{name}_{i}", array[:, i]) for i in range(array.shape[1])}
    if array.ndim > 4:
        raise DataError(f"the array `{name}` must have at most 4 axes, got {array.ndim}")
    return {name: _column(name, array)}


def _column(name: str, array: Array) -> Column:
    if array.dtype.kind in "biufmM":
        return array.astype(np.float32) if array.dtype.kind == "f" and array.dtype.itemsize == 2 else array
    if array.dtype.kind not in "USOT":
        return not_usable(len(array), name, str(array.dtype)[:80])
    try:
        cells = [cell.decode() if isinstance(cell, bytes) else cell for cell in array.tolist()]
    except UnicodeDecodeError:
        return not_usable(len(array), name, "bytes that are no text in UTF-8")
    return _json_column(name, cells)


def _jsonl(path: Path) -> Table:
    """Read JSON lines with Python, since pyarrow has crashed on lines that are not objects."""
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            row = _json_row(path, number, line)
            if row:
                rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, Column] = {}
    for name in names:
        _add(columns, {as_name(name): _json_column(name, [row.get(name) for row in rows])})
    return Table(columns)


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    quoted = repr(line[:40])
    try:
        row = json.loads(line, object_pairs_hook=_object) if line.strip() else {}
    except ValueError as error:
        raise DataError(f"line {number} of '{path}' is no JSON ({error}), got {quoted}: mend or remove it", quoted) from None
    if not isinstance(row, dict):
        raise DataError(
            f"line {number} of '{path}' must be a JSON object, a name and a value for each column, got {quoted}", quoted
        )
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for at, (name, _) in enumerate(pairs) if name in dict(pairs[:at]))
        raise ValueError(f"the name {as_told(name, 60)!r} stands twice")
    return found


def _json_column(name: str, values: list[Any]) -> Column:
    kinds = [type(value).__name__ for value in values if isinstance(value, list | dict)]
    return not_usable(len(values), name, f"a {kinds[0]}") if kinds else Text.of(values)


def _images(folder: Path, side: int) -> Table:
    """Read folder/TASK/CLASS/image, or folder/CLASS/image as a single task `all`."""
    _of_extra("PIL.Image")
    found: Any = import_module("quickbloom.common.datasets.own.files.image_folder").read_images(folder, side, LIMIT)
    table = Table({PIXELS: found.pixels, "class": Text.of(found.classes), "task": Text.of(found.tasks)})
    table.remarks += found.remarks
    table.files = found.files
    return table


def _from_function(name: str) -> Table:
    module, _, attribute = name.partition(":")
    found: object = getattr(import_own(module), attribute)
    returned = found() if callable(found) else None
    if not isinstance(returned, Mapping):
        raise DataError(f"the data '{name}' must name a function without arguments that returns a dictionary of arrays")
    columns: dict[str, Column] = {}
    for key, value in returned.items():
        _add(columns, _columns(as_name(str(key)), _array(value)))
    return Table(columns)


def _array(value: object) -> Array:
    """Return the value as an array; masked cells are missing. Raises DataError for masked images."""
    if not isinstance(value, np.ma.MaskedArray):
        return np.asarray(value)
    if value.ndim > 2:
        raise DataError("images with a mask have no pixels where it is: fill them, or leave such rows out")
    held = np.ma.getdata(value).astype(object)
    held[np.ma.getmaskarray(value)] = None
    return held.astype(np.float64) if value.dtype.kind == "f" else held


def _of_extra(module: str) -> None:
    needs("datasets", module, "this kind of data", instead=", or use .npz or .csv", error=DataError)
