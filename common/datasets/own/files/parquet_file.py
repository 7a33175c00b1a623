"""Parquet files as columns. pyarrow gives the types, and only usable columns are read."""

from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from quickbloom.common.datasets.own.files.pictures import Pictures
from quickbloom.common.datasets.own.text import Array, Text, as_name, clean
from quickbloom.common.errors import DataError

_UUID = "extension<arrow.uuid>"


class Unusable:
    """A column whose values are neither numbers nor text; an error only if it is used.

    `reason`: the error message.
    """

    def __init__(self, rows: int, reason: str) -> None:
        self._rows = rows
        self.reason = reason

    def __len__(self) -> int:
        return self._rows


Column = Array | Text | Pictures | Unusable


def not_usable(rows: int, name: str, kind: str) -> Unusable:
    """Return an unusable column that holds values of `kind`."""
    return Unusable(
        rows,
        f"the column `{name}` must hold numbers or text, got {kind}: leave it out with `own.features`, or save it as numbers "
        "or text, in several columns if need be",
    )


def read_parquet(path: Path, check_size: Any) -> dict[str, Column]:
    """Return the columns by name. `check_size(path, bytes)` raises DataError for too many bytes.

    Equal text is stored once for all rows, but counted for each: a file of 2 kB may expand to
    gigabytes.
    """
    parquet, types = import_module("pyarrow.parquet"), import_module("pyarrow.types")
    with path.open("rb") as stream:
        facts = parquet.ParquetFile(stream)
        schema, size = facts.schema_arrow, facts.metadata
        check_size(path, sum(size.row_group(i).total_byte_size for i in range(size.num_row_groups)))
        check_size(path, 8 * size.num_rows * size.num_columns)
        if len(set(schema.names)) < len(schema.names):
            twice = next(name for name in schema.names if schema.names.count(name) > 1)
            raise DataError(f"the column `{twice}` stands twice in the data: rename one")
        usable = [field.name for field in schema if _is_usable(types, field.type)]
        words = [field.name for field in schema if _is_text(types, field.type)]
        file = parquet.ParquetFile(stream, read_dictionary=words)
        # Nested columns, which may have any number of leaves, are not read.
        table: Any = file.read(columns=usable, use_threads=False) if usable else None
    columns: dict[str, Column] = {}
    for field in schema:
        name = as_name(field.name)
        if name in columns:
            raise DataError(f"the column `{name}` stands twice in the data: rename one")
        columns[name] = (
            _column(types, table[field.name])
            if field.name in usable
            else not_usable(size.num_rows, field.name, str(field.type)[:80])
        )
    texts = [column for column in columns.values() if isinstance(column, Text)]
    check_size(
        path, sum(int(text.counts() @ np.array([len(value) for value in text.values], dtype=np.int64)) for text in texts)
    )
    return columns


def _is_text(types: Any, kind: Any) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_usable(types: Any, kind: Any) -> bool:
    if types.is_dictionary(kind):
        return not types.is_dictionary(kind.value_type) and _is_usable(types, kind.value_type)
    view = getattr(types, "is_string_view", lambda kind: False)
    if types.is_interval(kind):
        return False
    if str(kind) == _UUID:
        return True
    asked = ("is_integer", "is_floating", "is_boolean", "is_null", "is_decimal", "is_temporal")
    return _is_text(types, kind) or bool(view(kind)) or any(getattr(types, name)(kind) for name in asked)


def _column(types: Any, column: Any) -> Column:
    kind = column.type
    if types.is_dictionary(kind):
        if not _is_text(types, kind.value_type):
            return _column(types, column.cast(kind.value_type))
        return _of_dictionary(column.unify_dictionaries())
    if str(kind) == _UUID:
        return Text.of(UUID(bytes=bytes(value)) if isinstance(value, bytes) else value for value in column.to_pylist())
    if types.is_null(kind):
        return np.full(len(column), np.nan)
    if types.is_floating(kind):
        return np.asarray(column.cast("float32" if types.is_float16(kind) else kind).to_numpy())
    if types.is_integer(kind) or types.is_boolean(kind):
        return np.asarray(column.to_numpy()) if not column.null_count else _of_dictionary(_as_dictionary(column, "string"))
    if types.is_timestamp(kind) or types.is_date(kind) or types.is_duration(kind):
        return _moments(types, column, kind)
    return _of_dictionary(_as_dictionary(column, "string"))


def _as_dictionary(column: Any, kind: str) -> Any:
    return column.cast(kind).dictionary_encode().unify_dictionaries()


def _of_dictionary(column: Any) -> Text:
    if not column.num_chunks or not len(column):
        return Text(np.full(len(column), -1, dtype=np.int64), [])
    values = column.chunk(0).dictionary.to_pylist()
    codes = [np.asarray(chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int64) for chunk in column.chunks]
    return Text(np.concatenate(codes), [value or "" for value in values]).mapped(clean)


def _moments(types: Any, column: Any, kind: Any) -> Array:
    """Return datetime64 or timedelta64 [rows] in the column's own unit; for some units pyarrow would need pandas."""
    if types.is_date(kind):
        column, unit, letter = column.cast("date32").cast("int32"), "D", "M"
    else:
        unit, letter = kind.unit, "m" if types.is_duration(kind) else "M"
    missing = np.asarray(column.is_null().to_numpy(), dtype=bool)
    whole = np.asarray(column.cast("int64").fill_null(0).to_numpy(), dtype=np.int64)
    result = whole.astype(f"{letter}8[{unit}]")
    result[missing] = np.array("NaT", dtype=result.dtype)
    return result
