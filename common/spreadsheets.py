"""CSV that is safe in spreadsheets: text that would run as a formula gets an apostrophe in front of it.

Names of tasks and classes come from other people's files. A spreadsheet evaluates a cell that begins with =,
+, - or @, even in quotation marks, and a formula can start programs or send away other cells. Numbers stay
numbers. `read_csv` returns exactly what `write_csv` was given.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

_RUNS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
"""First characters of a formula, including the wide forms of =, +, - and @. Some programs skip leading spaces."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MARK = "'"


def cell(value: Any) -> Any:
    """Return `value` as it is written to CSV: text that a spreadsheet would run gets an apostrophe, all else stays."""
    return _MARK + value if isinstance(value, str) and _would_run(value) else value


def text_of(written: str) -> str:
    """Return the text that `cell` was given: the inverse of `cell`."""
    return written[1:] if written.startswith(_MARK) and _would_run(written) else written


def write_csv(file: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], end: str = "\r\n") -> None:
    """Write a header and the rows. `end` is the line terminator. Raises ValueError for a column not in `columns`."""
    writer = csv.writer(file, lineterminator=end)
    writer.writerow([cell(name) for name in columns])
    for row in rows:
        if strange := row.keys() - set(columns):
            raise ValueError(f"there is no column {sorted(strange)[0]!r}")
        writer.writerow([cell(row.get(name, "")) for name in columns])


def read_csv(file: TextIO) -> Iterator[dict[str, str]]:
    """Yield the rows of a file from `write_csv`, by column name. Raises csv.Error."""
    lines = csv.reader(file)
    columns = [text_of(name) for name in next(lines, [])]
    for line in lines:
        yield dict(zip(columns, map(text_of, line), strict=False))


def _would_run(text: str) -> bool:
    # Text that already begins with apostrophes gets one more; otherwise reading would remove one of its own.
    bare = text.lstrip(_MARK)
    begins = bare.startswith(_RUNS) or bare.lstrip().startswith(_RUNS)
    return begins and not (bare == text and _NUMBER.fullmatch(text))
