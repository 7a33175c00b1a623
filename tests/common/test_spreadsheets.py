"""Text stays text in a spreadsheet, numbers stay numbers, and what was written is read again."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickbloom.common.spreadsheets import cell, read_csv, text_of, write_csv

CALLS = [
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "=",
    "-",
    "+cmd|' /C calc'!A0",
    "\uff1d1+1",
    "-inf",
    "-A",
]


@pytest.mark.parametrize("text", CALLS)
def test_a_text_that_would_be_run_begins_with_an_apostrophe(text: str) -> None:
    file = io.StringIO()
    write_csv(file, ["task", text], [{"task": text, text: 1}])
    file.seek(0)
    assert list(csv.reader(file)) == [["task", "'" + text], ["'" + text, "1"]]  # what a spreadsheet reads
    assert text_of(cell(text)) == text


@pytest.mark.parametrize("number", ["-1.5", "+3", "-1e-05", "-.5", "12", -1.5, -3, None, True, float("-inf")])
def test_a_number_stays_a_number(number: object) -> None:
    assert cell(number) is number


@pytest.mark.parametrize("text", ["", "ward-7", "a=b", "O'Brien", "'quoted'", "1-2", "\u4eac"])
def test_any_other_text_stays_as_it_is(text: str) -> None:
    assert cell(text) == text == text_of(text)


@given(st.lists(st.text(alphabet="'=+-@ \t\r\n1.a,\"", max_size=5) | st.text(max_size=5), min_size=1, max_size=3))
def test_what_was_written_is_read_again(texts: list[str]) -> None:
    columns = [f"c{number}" for number in range(len(texts))]
    row = dict(zip(columns, texts, strict=True))
    file = io.StringIO(newline="")
    write_csv(file, columns, [row, row])
    file.seek(0)
    assert list(read_csv(file)) == [row, row]
    assert all(cell(text) != "'" + text or text_of(cell(text)) == text for text in texts)


def test_a_row_with_a_column_of_its_own_is_a_defect() -> None:
    with pytest.raises(ValueError, match="no column 'b'"):
        write_csv(io.StringIO(), ["a"], [{"a": 1, "b": 2}])
