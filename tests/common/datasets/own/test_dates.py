"""Dates and times as numbers, against Python's own calendar."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from quickbloom.common.datasets.own.dates import cyclic, of_typed, read_moments
from quickbloom.common.datasets.own.text import Text


def days(*parts: int) -> float:
    """Days since 1970 of a moment in UTC."""
    return datetime(*parts, tzinfo=UTC).timestamp() / 86400  # type: ignore[arg-type, misc]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["2024-03-31", "1969-12-31"], [days(2024, 3, 31), -1.0]),
        (["2024-03-31 12:00", "2024-03-31T06:00:00"], [days(2024, 3, 31) + 0.5, days(2024, 3, 31) + 0.25]),
        (["2024-03-31T12:00:00Z", "2024-03-31T14:00:00+02:00"], [days(2024, 3, 31) + 0.5] * 2),
        (["2024-03-31 12:00:00.123456789"], [days(2024, 3, 31) + 0.5 + 0.123456 / 86400]),
        (["31.03.2024", "1.4.24"], [days(2024, 3, 31), days(2024, 4, 1)]),
        (["31/3/2024", "2/3/2024"], [days(2024, 3, 31), days(2024, 3, 2)]),
        (["3/31/2024", "3/2/2024"], [days(2024, 3, 31), days(2024, 3, 2)]),
        (["2024/3/31"], [days(2024, 3, 31)]),
        (["31 Mar 2024", "March 31, 2024", "31-Mar-2024"], [days(2024, 3, 31)] * 3),
        (["03/31/2024 1:30 PM", "03/02/2024 12:00 AM"], [days(2024, 3, 31) + 13.5 / 24, days(2024, 3, 2)]),
        (["2024-03-31", "NA", ""], [days(2024, 3, 31), np.nan, np.nan]),
        (["2024/4/1", "2024/03/31 7:30"], [days(2024, 4, 1), days(2024, 3, 31) + 7.5 / 24]),
        (["2024-03-31 12:00:00+02", "2024-03-31 12:00 UTC", "2024-03-31 12:00 GMT"],
         [days(2024, 3, 31) + 10 / 24, days(2024, 3, 31) + 0.5, days(2024, 3, 31) + 0.5]),
        (["20240331T120000Z", "20240331T1200+0200", "20240331T120000"],
         [days(2024, 3, 31) + 0.5, days(2024, 3, 31) + 10 / 24, days(2024, 3, 31) + 0.5]),
        (["2024-W13-7", "2024W14", "2024-W14"], [days(2024, 3, 31), days(2024, 4, 1), days(2024, 4, 1)]),
        (["31. 3. 2024", "1. 4. 2024"], [days(2024, 3, 31), days(2024, 4, 1)]),
        (["2024.03.31.", "2024. 4. 1."], [days(2024, 3, 31), days(2024, 4, 1)]),
        (["31/03/2024T10:30", "1/4/2024 10:30:00.5"],
         [days(2024, 3, 31) + 10.5 / 24, days(2024, 4, 1) + (10.5 + 0.5 / 3600) / 24]),
        (["Sun, 31 Mar 2024 10:00:00 GMT", "Mon, 01 Apr 2024 10:00:00 +0200"],
         [days(2024, 3, 31) + 10 / 24, days(2024, 4, 1) + 8 / 24]),
        (["Sun Mar 31 10:00:00 2024", "Mon Apr  1 10:00:00 2024"], [days(2024, 3, 31) + 10 / 24, days(2024, 4, 1) + 10 / 24]),
        (["Sunday, March 31st, 2024", "Apr. 1, 2024", "1 Sept. 2024"], [days(2024, 3, 31), days(2024, 4, 1), days(2024, 9, 1)]),
        (["31MAR2024:10:30:00", "01APR24"], [days(2024, 3, 31) + 10.5 / 24, days(2024, 4, 1)]),
        (["Mar 31, 2024 10:30 p.m.", "31 Mar 2024, 12:00 AM"], [days(2024, 3, 31) + 22.5 / 24, days(2024, 3, 31)]),
    ],
)  # fmt: skip
def test_dates_are_days_since_1970(cells: list[str], expected: list[float]) -> None:
    text = Text.of(cells)
    found = read_moments(text)
    assert found.kind == "date"
    assert not found.wrong.any()
    np.testing.assert_allclose(text.spread(found.numbers, np.nan), expected, atol=1e-9)


def test_times_of_day_are_hours() -> None:
    found = read_moments(Text.of(["10:30", "0:06:00", "12:15 am", "11:45 PM", "1:30 p.m.", "10:30:00.000000000"]))
    assert found.kind == "time"
    np.testing.assert_allclose(found.numbers, [10.5, 0.1, 0.25, 23.75, 13.5, 10.5])


def test_a_date_that_may_be_two_is_so_only_where_nothing_decides() -> None:
    assert read_moments(Text.of(["3/4/2024", "5/6/2024"])).either == 0
    assert read_moments(Text.of(["3/3/2024", "31/3/2024"])).either == -1
    first, second = (read_moments(Text.of(["3/4/2024"]), order) for order in ("day-first", "month-first"))
    assert (first.numbers[0], second.numbers[0]) == (days(2024, 4, 3), days(2024, 3, 4))
    assert first.either == second.either == -1


@pytest.mark.parametrize(
    "cell",
    ["2024-02-30", "31.02.2024", "25:00", "2024-13-01", "13:00 PM", "K12", "192.168.0.1", "1.2.3", "31 Foo 2024", "2024-W60",
     "31/03/2024 10:75", "12345.03.2024", "2024-03-31 12:00 CET"],
)  # fmt: skip
def test_what_is_no_date_is_wrong(cell: str) -> None:
    text = Text.of(["2024-01-01", cell])
    assert text.values[int(np.flatnonzero(read_moments(text).wrong)[-1])] == cell


@pytest.mark.parametrize("unit", ["D", "s", "ms", "us", "ns"])
def test_typed_dates_are_the_same_numbers(unit: str) -> None:
    column: Any = np.array(["2024-03-31", "NaT"], dtype=f"datetime64[{unit}]")
    np.testing.assert_array_equal(of_typed(column), [days(2024, 3, 31), np.nan])
    assert of_typed(np.array([36], dtype="timedelta64[h]")).tolist() == [1.5]


def test_the_place_in_day_week_and_year_goes_round() -> None:
    noon = days(2024, 3, 31) + 0.5
    found = cyclic("at", "date", np.array([noon, noon + 7]))
    assert list(found) == [f"at ({period}, {word})" for period in ("day", "week", "year") for word in ("sine", "cosine")]
    assert found["at (day, cosine)"].tolist() == pytest.approx([-1, -1])
    for word in ("sine", "cosine"):
        first, second = found[f"at (week, {word})"]
        assert first == pytest.approx(second)
    assert list(cyclic("at", "time", np.array([6.0]))) == ["at (day, sine)", "at (day, cosine)"]
