"""Cells as written in a file: every distinct cell is stored once, and each row refers to one of them.

A long id therefore stays exact, a word is processed once for all rows, and equal cells are equal
text in every file.
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MISSING_WORDS = frozenset({"na", "n/a", "nan", "-nan", "null", "none", "#n/a", "#na", "<na>", "nat"})
"""Spellings of a missing number or date, in lower case; an empty cell is always missing."""
MISSING_IN_TEXT = frozenset({"nan", "-nan", "#n/a", "#na", "<na>"})
"""Spellings of a missing value among words, where `none` and `NA` may be answers: only those that programs write."""
_WITHOUT_WIDTH = dict.fromkeys((0x200B, 0x2060, 0xFEFF))
"""Invisible characters: zero-width spaces and byte order marks."""
_DECIMAL = re.compile(r"-?(?:0|[1-9][0-9]*)\.[0-9]+")
_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?")


@dataclass(frozen=True, eq=False)
class Text:
    """A column of cells. `values`: the distinct ones; `codes`: int64 [rows], the index of each row's value, -1: empty."""

    codes: Array
    values: list[str]

    @classmethod
    def of(cls, cells: Iterable[Any]) -> "Text":
        """Return a column from cells of any type, stripped of surrounding spaces; None and spaces are empty."""
        places: dict[str, int] = {}
        codes = np.array([places.setdefault(cell, len(places)) for cell in map(_as_cell, cells)], dtype=np.int64)
        return cls(codes, list(places)).mapped(clean)

    ndim = 1

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: Array) -> "Text":
        """Return the column restricted to `rows`."""
        return Text(self.codes[rows], self.values)

    def cells(self) -> list[str | None]:
        """Return the cell of every row, None if it is empty."""
        with_empty = [*self.values, None]
        return [with_empty[code] for code in self.codes]

    def counts(self) -> Array:
        """Return the number of rows per value: int64 [values]."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.values))

    def first_row(self, place: int) -> int:
        """Return the first row, counted from 0, that holds the value at `place`."""
        return int(np.flatnonzero(self.codes == place)[0])

    def spread(self, of_values: Array, empty: Any) -> Array:
        """Return [rows] from [values]: the entry for each row's value, or `empty`."""
        return np.concatenate([of_values, np.array([empty], dtype=of_values.dtype)])[self.codes]

    def mapped(self, change: Callable[[str], str]) -> "Text":
        """Return the column with `change` applied to every value; equal results merge, "" becomes empty, unused values go."""
        places: dict[str, int] = {}
        found = [change(value) for value in self.values]
        held = self.counts() > 0
        new = [
            places.setdefault(value, len(places)) if value and there else -1 for value, there in zip(found, held, strict=True)
        ]
        return Text(self.spread(np.array(new, dtype=np.int64), -1), list(places))

    def without(self, words: Collection[str]) -> "Text":
        """Return the column with cells that are one of `words`, in any case, made empty."""
        return self.mapped(lambda value: "" if value.casefold() in words else value)


def clean(cell: str) -> str:
    """Return the cell without surrounding spaces, composed (NFC), so that cells that look equal are equal."""
    cell = cell.strip()
    if cell.isascii():
        return cell
    # A lone surrogate, which JSON may hold, can be neither written nor hashed.
    return unicodedata.normalize("NFC", cell.encode("utf-8", "replace").decode().translate(_WITHOUT_WIDTH)).strip()


def as_name(name: str) -> str:
    """Return the name of a column: clean, on one line."""
    return clean(" ".join(part.strip() for part in name.splitlines()))


def _as_cell(value: Any) -> str:
    if value is None or (isinstance(value, float | np.floating) and value != value):
        return ""
    return str(value)


def as_text(column: "Text | Array") -> Text:
    """Return any column as text, equal for equal cells of every kind of file: 1, 1.0 and "1.0" are 1; `TRUE` is True.

    `0401` stays as it is, and integers of any size are exact.
    """
    if isinstance(column, Text):
        return column.mapped(_canonical)
    values, codes = np.unique(column, return_inverse=True)
    return Text(codes.reshape(-1).astype(np.int64), [_of_number(value) for value in values]).mapped(str)


def _canonical(value: str) -> str:
    if value.casefold() in ("true", "false"):
        return value.capitalize()
    if _MOMENT.fullmatch(value):
        return _of_moment(value)
    if not _DECIMAL.fullmatch(value):
        return value
    short = value.rstrip("0").rstrip(".")
    return "0" if short == "-0" else short


def _of_number(value: Any) -> str:
    if isinstance(value, np.floating):
        return "" if np.isnan(value) else _of_float(value)
    if isinstance(value, np.datetime64 | np.timedelta64):
        return "" if np.isnat(value) else _canonical(str(value))
    return str(value)


def _of_moment(text: str) -> str:
    """Return a moment as in a text file, whatever the column's unit: without trailing zeros."""
    date, _, time = text.replace(" ", "T").partition("T")
    time = time.rstrip("0").rstrip(".") if "." in time else time
    return date if time in ("00:00", "00:00:00") else f"{date} {time}"


def _of_float(value: Any) -> str:
    size = abs(float(value))  # a narrow type cannot hold the bounds
    if value == np.round(value) and size < 1e22:
        return str(int(value))
    plain = 1e-5 <= size < 1e16
    return np.format_float_positional(value, trim="-") if plain else str(value)


def otherwise_numbers(text: Text) -> bool:
    """Return whether all cells are plain numbers or spell a missing value; `NA` among them is then missing."""
    known = [value for value in text.values if value.casefold() not in MISSING_WORDS]
    return bool(known) and all(map(_is_number, known))


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return "_" not in value


def names(column: "Text | Array", missing: Collection[str] = ()) -> Text:
    """Return a column of names (tasks, classes, splits) as text, in which missing values are empty.

    Among numbers `MISSING_WORDS` are missing, among words `MISSING_IN_TEXT`; `missing`: further
    words, in lower case.
    """
    text = as_text(column)
    return text.without({*(MISSING_WORDS if otherwise_numbers(text) else MISSING_IN_TEXT), *missing})
