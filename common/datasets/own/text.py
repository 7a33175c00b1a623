"""Cells as they stand in a file: every different one is kept once, and every row says which of them it holds.

So a long id stays exact, a word is looked at once however many rows hold it, and the same cell is the same text in every file.
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MISSING_WORDS = frozenset({"na", "n/a", "nan", "-nan", "null", "none", "#n/a", "#na", "<na>", "nat"})
"""How files spell a missing number or date, in small letters; an empty cell is missing everywhere."""
MISSING_IN_TEXT = frozenset({"nan", "-nan", "#n/a", "#na", "<na>"})
"""Among words, `none` and `NA` may be answers: only what programs write for a missing number is missing there."""
_WITHOUT_WIDTH = dict.fromkeys((0x200B, 0x2060, 0xFEFF))
"""Characters that nobody sees: blanks without a width, and byte order marks."""
_DECIMAL = re.compile(r"-?(?:0|[1-9][0-9]*)\.[0-9]+")
_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?")


@dataclass(frozen=True, eq=False)
class Text:
    """A column of cells. `values`: the different ones; `codes`: int64 [rows], which of them each row has, -1: empty."""

    codes: Array
    values: list[str]

    @classmethod
    def of(cls, cells: Iterable[Any]) -> "Text":
        """From cells of any type; None and blanks are empty. What stands round a cell as blanks is taken off."""
        places: dict[str, int] = {}
        codes = np.array([places.setdefault(cell, len(places)) for cell in map(_as_cell, cells)], dtype=np.int64)
        return cls(codes, list(places)).mapped(clean)

    ndim = 1

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: Array) -> "Text":
        """The same column of some rows."""
        return Text(self.codes[rows], self.values)

    def cells(self) -> list[str | None]:
        """The cell of every row, None where it is empty."""
        with_empty = [*self.values, None]
        return [with_empty[code] for code in self.codes]

    def counts(self) -> Array:
        """How many rows hold each value: int64 [values]."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.values))

    def first_row(self, place: int) -> int:
        """The first row that holds the value at `place`, counted from 0."""
        return int(np.flatnonzero(self.codes == place)[0])

    def spread(self, of_values: Array, empty: Any) -> Array:
        """[rows] from [values]: what belongs to each row's value, `empty` where there is none."""
        return np.concatenate([of_values, np.array([empty], dtype=of_values.dtype)])[self.codes]

    def mapped(self, change: Callable[[str], str]) -> "Text":
        """With every value changed; those that become equal are one, "" becomes empty, and what no row holds goes."""
        places: dict[str, int] = {}
        found = [change(value) for value in self.values]
        held = self.counts() > 0
        new = [
            places.setdefault(value, len(places)) if value and there else -1 for value, there in zip(found, held, strict=True)
        ]
        return Text(self.spread(np.array(new, dtype=np.int64), -1), list(places))

    def without(self, words: Collection[str]) -> "Text":
        """With cells that are one of these words, whatever their case, as empty ones."""
        return self.mapped(lambda value: "" if value.casefold() in words else value)


def clean(cell: str) -> str:
    """Without blanks round it, and composed (NFC): two cells that look the same are the same."""
    cell = cell.strip()
    if cell.isascii():
        return cell
    # Half a character, as JSON may hold, can be neither written nor hashed.
    return unicodedata.normalize("NFC", cell.encode("utf-8", "replace").decode().translate(_WITHOUT_WIDTH)).strip()


def as_name(name: str) -> str:
    """The name of a column: clean, on one line."""
    return clean(" ".join(part.strip() for part in name.splitlines()))


def _as_cell(value: Any) -> str:
    if value is None or (isinstance(value, float | np.floating) and value != value):
        return ""
    return str(value)


def as_text(column: "Text | Array") -> Text:
    """Any column as text, the same for the same cell of every kind of file: 1, 1.0 and "1.0" are 1, `TRUE` is True.

    `0401` stays what it is, and whole numbers are exact whatever their size.
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
    """As it stands in a text file, whatever the unit of the column was: without zeros that say nothing."""
    date, _, time = text.replace(" ", "T").partition("T")
    time = time.rstrip("0").rstrip(".") if "." in time else time
    return date if time in ("00:00", "00:00:00") else f"{date} {time}"


def _of_float(value: Any) -> str:
    size = abs(float(value))  # a narrow type has no place for the bounds
    if value == np.round(value) and size < 1e22:
        return str(int(value))
    plain = 1e-5 <= size < 1e16
    return np.format_float_positional(value, trim="-") if plain else str(value)


def otherwise_numbers(text: Text) -> bool:
    """Whether all cells but those that spell a missing value are plain numbers: `NA` among those is no word of its own."""
    known = [value for value in text.values if value.casefold() not in MISSING_WORDS]
    return bool(known) and all(map(_is_number, known))


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return "_" not in value


def names(column: "Text | Array", missing: Collection[str] = ()) -> Text:
    """A column of names (tasks, classes, splits): text, in which cells that mean a missing value are empty.

    Among numbers that is all of `MISSING_WORDS`, among words `MISSING_IN_TEXT`; `missing`: more words, in small letters.
    """
    text = as_text(column)
    return text.without({*(MISSING_WORDS if otherwise_numbers(text) else MISSING_IN_TEXT), *missing})
