"""Cells as text: exact, and the same for the same cell of every kind of file."""

from typing import Any

import numpy as np
import pytest

from quickbloom.common.datasets.own.text import Text, as_text, names, otherwise_numbers


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        (Text.of(["1", "1.0", "1.50", "0401", "401", "1e3", ""]), ["1", "1", "1.5", "0401", "401", "1e3", None]),
        (Text.of(["TRUE", "true", "False", " yes "]), ["True", "True", "False", "yes"]),
        (np.array([1.0, 2.5, np.nan, -0.0]), ["1", "2.5", None, "0"]),
        (np.array([0.1, 1.5], dtype=np.float32), ["0.1", "1.5"]),  # and not 0.10000000149
        (np.array([0.5, 2], dtype=">f2"), ["0.5", "2"]),
        (np.array([True, False]), ["True", "False"]),
        (np.array([1583715738627261037, 1583715738627261038]), ["1583715738627261037", "1583715738627261038"]),
        (np.array([2**64 - 1], dtype=np.uint64), ["18446744073709551615"]),
        (np.array(["2024-03-01", "NaT"], dtype="datetime64[s]"), ["2024-03-01", None]),
        (np.array(["2024-03-01", "2024-03-01T10:30:00.5"], dtype="datetime64[ns]"), ["2024-03-01", "2024-03-01 10:30:00.5"]),
        (Text.of(["2024-03-01 00:00:00", "2024-03-01T10:30:00.500"]), ["2024-03-01", "2024-03-01 10:30:00.5"]),
        (np.array([1583715738627260416.0, 1e20]), ["1583715738627260416", "100000000000000000000"]),
        (Text.of(["\u200bM", "M\ufeff", "<NA>"]), ["M", "M", "<NA>"]),
    ],
    ids=[
        "numbers",
        "truths",
        "floats",
        "float32",
        "half",
        "bool",
        "int64",
        "uint64",
        "dates",
        "nanoseconds",
        "moments",
        "long floats",
        "no width",
    ],
)
def test_the_same_cell_is_the_same_text_whatever_holds_it(column: Text | np.ndarray[Any, Any], cells: list[str | None]) -> None:
    assert as_text(column).cells() == cells


def test_what_looks_the_same_is_the_same() -> None:
    text = Text.of(["a\u0308 ", "\u00e4", "\u00a0b", "b"])
    assert text.values == ["\u00e4", "b"]
    assert text.codes.tolist() == [0, 0, 1, 1]


def test_half_a_character_can_be_written_and_hashed() -> None:
    assert Text.of(["a\ud800"]).values[0].encode()


def test_words_for_a_missing_value_are_answers_among_words_and_missing_among_numbers() -> None:
    assert names(Text.of(["mild", "none", "NA", "null", "nan", ""])).cells() == ["mild", "none", "NA", "null", None, None]
    assert names(Text.of(["1", "none", "NA", "2"])).cells() == ["1", None, None, "2"]
    assert names(Text.of(["mild", "none"]), {"none"}).cells() == ["mild", None]
    assert not otherwise_numbers(Text.of(["none", "NA"]))


def test_rows_are_counted_and_found_by_value() -> None:
    text = Text.of(["b", "a", "", "b"])
    assert dict(zip(text.values, text.counts().tolist(), strict=True)) == {"b": 2, "a": 1}
    assert text.first_row(1) == 1
    assert text.take(np.array([3, 2])).cells() == ["b", None]
    assert text.spread(np.array([10.0, 20.0]), -1.0).tolist() == [10.0, 20.0, -1.0, 10.0]
