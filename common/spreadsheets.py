"""CSV as spreadsheets take it: a text that they would run as a formula is kept a text by an apostrophe in front of it.

Names of tasks and classes come from other people's files, and a spreadsheet computes a cell that begins with =, +, - or @,
whatever quotation marks are around it; a formula can start programs and send what other cells hold. Numbers stay numbers.
`read_csv` gives back what `write_csv` was given.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

_RUNS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
"""What a formula begins with, the wide forms of =, +, - and @ included; blanks in front of it are passed over by some."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MARK = "'"


def cell(value: Any) -> Any:
    """`value` as it is written: only a text that a spreadsheet would run is another one."""
    return _MARK + value if isinstance(value, str) and _would_run(value) else value


def text_of(written: str) -> str:
    """The text for which `cell` gave this one."""
    return written[1:] if written.startswith(_MARK) and _would_run(written) else written


def write_csv(file: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], end: str = "\r\n") -> None:
    """A header and the rows. `end`: of a line."""
    writer = csv.writer(file, lineterminator=end)
    writer.writerow([cell(name) for name in columns])
    for row in rows:
        if strange := row.keys() - set(columns):
            raise ValueError(f"there is no column {sorted(strange)[0]!r}")
        writer.writerow([cell(row.get(name, "")) for name in columns])


def read_csv(file: TextIO) -> Iterator[dict[str, str]]:
    """The rows of what `write_csv` has written. Raises csv.Error."""
    lines = csv.reader(file)
    columns = [text_of(name) for name in next(lines, [])]
    for line in lines:
        yield dict(zip(columns, map(text_of, line), strict=False))


def _would_run(text: str) -> bool:
    # Of a text that begins with apostrophes itself one more is written, or reading would take one of them away.
    bare = text.lstrip(_MARK)
    begins = bare.startswith(_RUNS) or bare.lstrip().startswith(_RUNS)
    return begins and not (bare == text and _NUMBER.fullmatch(text))
