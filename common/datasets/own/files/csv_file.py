"""CSV files as columns of text, plain or packed by gzip.

Python parses them; this module handles the additions of spreadsheets and programs.
"""

import csv
import gzip
import re
from codecs import getincrementaldecoder
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TextIO, cast

import numpy as np

from quickbloom.common.datasets.own.text import Text, as_name, clean
from quickbloom.common.errors import DataError

_LONGEST_CELL = 2**24
_BLOCK = 2**20
_CHUNK = 20_000
"""Rows held as Python lists at once."""
_MOST_BEFORE = 1000
"""Most lines before the header."""
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\1*\s*', re.IGNORECASE)
"""The line by which Excel recognises the delimiter, also in the form that Excel saves again."""
_FORMULA = re.compile(r'="([^"]*)"')
"""A cell that tells Excel to keep its text, such as ="0401"."""


PACKED = ".csv.gz"
"""How the name of a file ends that is packed."""


def is_packed(path: Path) -> bool:
    """Return whether a file is packed by gzip, by its name."""
    return path.name.lower().endswith(".gz")


def read_csv(path: Path, limit: int) -> tuple[dict[str, Text], str]:
    """Return the columns and the delimiter. `limit`: most bytes of text, which a packed file may hide.

    The delimiter is the one of comma, semicolon and tab that is most frequent in the header outside
    of quotes. A byte order mark, Excel's line `sep=;` and comments before the header are
    understood. Raises DataError.
    """
    _check_encoding(path, limit)
    csv.field_size_limit(_LONGEST_CELL)
    with _text_of(path) as file:
        delimiter, comments = _look_at_start(file)
    with _text_of(path) as file:
        for _ in range(comments):
            file.readline()
        rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            return _columns(path, rows), delimiter
        except csv.Error as error:
            line = rows.line_num + comments
            raise DataError(
                f"the text of '{path}' cannot be read near line {line} ({error}): is a quotation mark missing, one too many, "
                "or followed by a blank?"
            ) from None


def _text_of(path: Path) -> TextIO:
    if is_packed(path):
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    return path.open(encoding="utf-8-sig", newline="")


def _columns(path: Path, rows: Iterator[list[str]]) -> dict[str, Text]:
    filled = (row for row in rows if len(row) > 1 or (row and row[0].strip()))
    header = [as_name(name.removeprefix("#") if at == 0 else name) for at, name in enumerate(next(filled, []))]
    if not header:
        raise DataError(f"the data '{path}' hold no rows: at least one task with a few examples is needed")
    width = len(header) + 1  # of the longest row, which may end with a delimiter
    while not header[-1] and len(header) > 1:  # delimiters at the end of the header
        header.pop()
    columns = [_Growing() for _ in header]
    done = 0
    while chunk := list(islice(filled, _CHUNK)):
        for number, row in enumerate(chunk, start=done + 1):
            while len(header) < len(row) <= width and not row[-1].strip():
                row.pop()
            if len(row) != len(header):
                raise DataError(
                    f"row {number} of '{path}' (without the header) has {len(row)} columns, the header {len(header)}: "
                    "mend or remove it"
                )
        for column, cells in zip(columns, zip(*chunk, strict=True), strict=True):
            column.add(cells)
        done += len(chunk)
    return named(path, header, [column.text() for column in columns])


def named(path: object, header: list[str], columns: list[Text]) -> dict[str, Text]:
    """Return the columns by name, without an empty first one that has no name.

    Raises DataError for missing or repeated names.
    """
    result: dict[str, Text] = {}
    for number, (name, column) in enumerate(zip(header, columns, strict=True), start=1):
        if not name and number > 1:
            if column.values:
                raise DataError(f"column {number} of '{path}' has no name in the header: give it one")
            continue
        if name in result:
            raise DataError(f"the column `{name}` stands twice in the data: rename one")
        result[name] = column
    if not result.get("", Text(np.zeros(0), ["x"])).values:
        del result[""]
    return result


class _Growing:
    """A column that is read in parts."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._codes: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []

    def add(self, cells: tuple[str, ...]) -> None:
        places = self._places
        self._codes.append(np.array([places.setdefault(cell, len(places)) for cell in cells], dtype=np.int64))

    def text(self) -> Text:
        codes = np.concatenate(self._codes) if self._codes else np.zeros(0, dtype=np.int64)
        return Text(codes, list(self._places)).mapped(
            lambda cell: clean(_FORMULA.sub(r"\1", cell) if cell[:1] == "=" else cell)
        )


def _look_at_start(file: TextIO) -> tuple[str, int]:
    """Return (delimiter, number of lines before the header): Excel's `sep=;`, comments, and empty lines."""
    before: list[str] = []
    said = ""
    while len(before) < _MOST_BEFORE and (line := file.readline(_BLOCK)):
        if found := _SEPARATOR_LINE.fullmatch(line.strip("\r\n")) if not before else None:
            said = found[1]
            before.append("")
            continue
        if line.strip() and not line.startswith("#"):
            break
        before.append(line)
    else:
        line = ""
    if before and before[-1].strip() and _is_header(before[-1], line):
        line = before.pop()
    while line.count('"') % 2 and len(line) < _BLOCK and (more := file.readline(_BLOCK)):  # a name on two lines
        line += more
    return said or _delimiter(line), len(before)


def _is_header(comment: str, first: str) -> bool:
    """Return whether a line with # is the header: the next line has as many columns, one of them a number."""
    sign = _delimiter(comment)
    cells = first.split(sign)
    return len(cells) > 1 and comment.count(sign) == first.count(sign) and any(_is_number(cell) for cell in cells)


def _is_number(cell: str) -> bool:
    try:
        float(cell.strip().strip('"').replace(",", "."))
    except ValueError:
        return False
    return True


def _delimiter(header: str) -> str:
    unquoted = re.sub(r'"[^"]*"', "", header)
    return max((",", ";", "\t"), key=unquoted.count)  # ties go to the first


def _check_encoding(path: Path, limit: int) -> None:
    """Raise DataError, which names the line, if the file is not UTF-8; or if it has more than `limit` bytes."""
    decoder, number, size = getincrementaldecoder("utf-8")(), 1, 0
    with cast(BinaryIO, gzip.open(path)) if is_packed(path) else path.open("rb") as file:
        start = file.read(_BLOCK)
        ending = b"\n" if b"\n" in start else b"\r"
        file.seek(0)
        try:
            while block := file.read(_BLOCK):
                decoder.decode(block)
                number += block.count(ending)
                size += len(block)
                if size > limit:
                    raise DataError(
                        f"the data '{path}' hold more than {limit / 1e9:.1f} GB of text, the most that is read: split or thin "
                        "them out"
                    )
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            line = number + error.object[: error.start].count(ending)
            raise DataError(
                f"the text of '{path}' is not in UTF-8 (line {line}): save it as UTF-8, which spreadsheets call \"CSV UTF-8\""
            ) from None
