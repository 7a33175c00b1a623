"""Simulated devices: hours worked by hand, the built-in fleet's promised properties, files that are none."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickbloom.common.errors import ConfigError
from quickbloom.server_app.messaging.devices import SECONDS, Device, devices_of, lognormal, read

HOUR = 3600.0


@pytest.mark.parametrize(
    ("start", "end", "hour", "there"),
    [
        *((9, 17, 8.99, False), (9, 17, 9, True), (9, 17, 16.99, True), (9, 17, 17, False), (9, 17, 24 * 40 + 10, True)),
        *((22, 6, 23, True), (22, 6, 30, False), (22, 6, 29.9, True), (0, 0, 13, True)),
    ],
)
def test_the_hours_of_a_device(start: float, end: float, hour: float, there: bool) -> None:
    assert Device(1.0, start, end).is_there(hour * HOUR) is there


@pytest.mark.parametrize(
    ("begun", "hours", "done"),
    [
        (9, 1, 10),
        (16, 2, 24 + 10),
        (20, 1, 24 + 10),
        (9, 8, 17),
        (9, 16, 24 + 17),
        (9, 17, 48 + 10),
        (24 * 3 + 9, 1, 24 * 3 + 10),
    ],
)
def test_a_device_pauses_while_it_is_away(begun: float, hours: float, done: float) -> None:
    """Between 9 and 17 o'clock; hours since the midnight before the run."""
    assert Device(1.0, 9, 17).finish(begun * HOUR, hours * HOUR) == pytest.approx(done * HOUR, abs=0.01)


def test_a_device_that_is_hardly_ever_there_is_reckoned_with_at_once() -> None:
    """A second a day, from 8 o'clock on: a billion seconds take a billion days."""
    assert Device(1.0, 0, 5e-324).finish(0.0, 1e9) >= 1e9
    assert Device(1.0, 8, 8 + 1 / 3600).finish(0.0, 1e9) == pytest.approx(8 * HOUR + (1e9 - 1) * 24 * HOUR + 1, rel=1e-6)


def test_a_device_that_is_always_there_never_pauses() -> None:
    assert Device(1.0).finish(5.0, 1e7) == 1e7 + 5.0


@given(st.floats(0, 24), st.floats(0, 24), st.floats(0, 1e6), st.floats(0.01, 1e6))
def test_work_takes_as_long_as_it_takes_or_longer(start: float, end: float, now: float, seconds: float) -> None:
    device = Device(1.0, start % 24, end % 24)
    done = device.finish(now, seconds)
    assert done >= now + seconds * (1 - 1e-9)
    hours = (device.end - device.start) % 24 or 24
    if hours > 0.1:  # a pause for each stretch of work, and one before
        assert done <= now + seconds + (seconds / (hours * HOUR) + 2) * 24 * HOUR


def test_the_built_in_fleet_is_as_slow_and_as_often_away_as_it_says() -> None:
    fleet = [lognormal(0, str(i)) for i in range(20_000)]
    seconds = np.array([device.seconds for device in fleet])
    assert np.median(seconds) == pytest.approx(SECONDS, rel=0.05)
    assert np.quantile(seconds, 0.9) == pytest.approx(10 * SECONDS, rel=0.05)
    there = [sum(device.is_there(hour * HOUR) for device in fleet) for hour in range(24)]
    assert np.mean(there) == pytest.approx(len(fleet) / 2, rel=0.02)
    assert 3.5 <= max(there) / min(there) <= 4.5
    assert lognormal(0, "7") == fleet[7] != lognormal(1, "7")


def test_a_file_says_who_is_slow(tmp_path: Path) -> None:
    path = tmp_path / "devices.csv"
    path.write_text("from,until,seconds,remark\n0,0,2.5,fast\n22,6,100,slow\n")
    found = devices_of(str(path), 0, {7: "c", 5: "a", 6: "b"})
    assert found == {5: Device(2.5), 6: Device(100.0, 22, 6), 7: Device(2.5)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "must be even, lognormal or a CSV file that can be read"),
        ("", "must have a first line with the columns seconds, from, until"),
        ("seconds,from\n1,2\n", "must have a first line with the columns"),
        ("seconds,from,until\n1,2,25\n", "line 2 .* `until` from 0 to 24"),
        ("seconds,from,until\n1,2,3\n0,2,3\n", "line 3 .* `seconds` above 0, got '0'"),
        ("seconds,from,until\nquick,2,3\n", "`seconds` above 0, got 'quick'"),
        ("seconds,from,until\nnan,2,3\n", "got 'nan'"),
        ("seconds,from,until\n1,2\n", "got None"),
    ],
)
def test_a_file_without_devices_is_refused_in_one_sentence(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "devices.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read(path)
