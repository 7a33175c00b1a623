"""Numbers as people write them, each by hand."""

import numpy as np
import pytest

from quickbloom.common.datasets.own.numbers import decimal_sign, read_numbers
from quickbloom.common.datasets.own.text import Text


@pytest.mark.parametrize(
    ("cells", "numbers", "how"),
    [
        (["1", "2.5", "-3e2", "+4", ".5"], [1, 2.5, -300, 4, 0.5], ""),
        (["1,234", "12,345.5", "7"], [1234, 12345.5, 7], "commas between thousands"),
        (["1.234,50", "0,5", "-12.345.678,9"], [1234.5, 0.5, -12345678.9], "decimal commas, points between thousands"),
        (["1 234,5", "1\u202f000\u00a0000,25"], [1234.5, 1000000.25], "decimal commas, blanks between thousands"),
        (["1'234.50", "12\u2019345.00"], [1234.5, 12345], "apostrophes between thousands"),
        (["1,23,456.00", "12,345.50"], [123456, 12345.5], "commas between thousands"),
        (["5.3%", "12 %", "-1%"], [5.3, 12, -1], "in %"),
        (["$1,200.00", "-$3.50", "$-7", "4"], [1200, -3.5, -7, 4], "commas between thousands, in $"),
        (["($1,200.00)", "$5.00"], [-1200, 5], "commas between thousands, in $, negative in brackets"),
        (["$(1,200.00)", "$(4)", "$5.00"], [-1200, -4, 5], "commas between thousands, in $, negative in brackets"),
        (["(1,200.00)", "(3.5)", "7"], [-1200, -3.5, 7], "commas between thousands, negative in brackets"),
        (["Rs. 1,00,000", "Rs 12.50"], [100000, 12.5], "commas between thousands, in Rs"),
        (["HK$1,200.00", "HK$3"], [1200, 3], "commas between thousands, in HK$"),
        (["5%", "0", "0.0", "7 %"], [5, 0, 0, 7], "in %"),
        (["\u20131.5", "\u20112", "\uff0d3"], [-1.5, -2, -3], ""),
        (["1\u2007234.5", "2"], [1234.5, 2], "blanks between thousands"),
        (["1.200,00 €", "\u22123,50 €"], [1200, -3.5], "decimal commas, points between thousands, in €"),
        (["EUR 5", "EUR 7.25"], [5, 7.25], "in EUR"),
        (["True", "FALSE", "1", "NA"], [1, 0, 1, np.nan], "True is 1, False 0"),
        (["1", "NA", "none", "#N/A", ""], [1, np.nan, np.nan, np.nan, np.nan], ""),
        (["1", "<NA>", "NaT"], [1, np.nan, np.nan], ""),
    ],
)
def test_a_column_is_read_by_its_convention(cells: list[str], numbers: list[float], how: str) -> None:
    text = Text.of(cells)
    found = read_numbers(text)
    assert not found.wrong.any()
    assert found.how == how
    np.testing.assert_allclose(text.spread(found.numbers, np.nan), numbers, rtol=1e-15)


@pytest.mark.parametrize(
    ("cells", "wrong"),
    [
        (["1,5", "2,5", "3.5"], "3.5"),  # two conventions: the rarer is a slip
        (["$5", "$6", "7 €"], "7 €"),
        (["5 %", "6 %", "0.05"], "0.05"),
        (["1", "2", "12-3"], "12-3"),
        (["1,234,5", "1", "2"], "1,234,5"),
        (["5.", "1_000", "2"], "1_000"),
        (["1", "2", "(5)"], "(5)"),  # of a footnote?
        (["10", "20", "True"], "True"),
        (["1", "2", "192.168.0.1"], "192.168.0.1"),
    ],
)
def test_a_cell_of_another_convention_is_no_number(cells: list[str], wrong: str) -> None:
    text = Text.of(cells)
    found = read_numbers(text)
    assert [value for value, bad in zip(text.values, found.wrong, strict=True) if bad] == [wrong]


@pytest.mark.parametrize(
    ("others", "default", "sign", "number"),
    [
        ([["0.5"]], ",", ".", 1234.0),
        ([["0,5"]], ".", ",", 1.234),
        ([["x", "7"]], ".", ".", 1234.0),
        ([["x", "7"]], ",", ",", 1.234),
        ([["0,5"], ["0.5"]], ".", "", 1234.0),
    ],
)
def test_the_other_columns_decide_what_a_cell_with_two_readings_is(
    others: list[list[str]], default: str, sign: str, number: float
) -> None:
    doubtful = Text.of(["1,234", "5,678"])
    found = decimal_sign([doubtful, *map(Text.of, others)], default)
    assert found == sign
    reading = read_numbers(doubtful, found)
    assert reading.either == 0  # whoever reads it must say so, or refuse
    if sign:
        assert reading.numbers[0] == number


def test_points_between_thousands_are_seen_in_a_file_with_decimal_commas() -> None:
    assert read_numbers(Text.of(["1.234", "12.000"]), ",").numbers.tolist() == [1234, 12000]
    assert read_numbers(Text.of(["1.234", "12.000"]), ".").numbers.tolist() == [1.234, 12.0]
    assert read_numbers(Text.of(["1.234", "0.5"]), ",").numbers.tolist() == [1.234, 0.5]
