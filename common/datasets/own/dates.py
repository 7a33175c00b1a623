"""Dates and times as numbers: days since 1970-01-01 00:00 (in UTC if a zone is given), times of day as hours.

A column is read in one form that all its cells follow. 03/04/2024 may be two dates: the other cells
of the column decide, else `own.date-order`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from math import pi
from typing import Literal

import numpy as np

from quickbloom.common.datasets.own.text import MISSING_WORDS, Array, Text

Order = Literal["auto", "day-first", "month-first"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CLOCK = r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:[.,][0-9]{1,9})?)?(?:\s?[AaPp]\.?\s?[Mm]\.?)?"
_ZONE = r"Z|UTC|GMT|[+-][0-9]{2}(?::?[0-9]{2})?"
_ISO = re.compile(
    rf"[0-9]{{4}}-[0-9]{{1,2}}-[0-9]{{1,2}}(?:[T ][0-9]{{1,2}}:[0-9]{{2}}(?::[0-9]{{2}}(?:[.,][0-9]{{1,9}})?)?\s?(?:{_ZONE})?)?"
)
_COMPACT = re.compile(rf"([0-9]{{4}})([0-9]{{2}})([0-9]{{2}})T([0-9]{{2}})([0-9]{{2}})([0-9]{{2}})?({_ZONE})?")
_WEEK = re.compile(r"([0-9]{4})-?W([0-9]{2})(?:-?([1-7]))?")
_TIME = re.compile(_CLOCK)
_TAIL = re.compile(rf"(?P<date>.+?)(?:(?:,?\s+|T|:)(?P<time>{_CLOCK})(?:\s?(?P<zone>{_ZONE}))?)?")
"""A date, and a time of day that may follow it."""
_DAY_LAST = re.compile(r"([0-9]{4})([./-])\s?([0-9]{1,2})\2\s?([0-9]{1,2})\.?")
_YEAR_LAST = re.compile(r"([0-9]{1,2})([./-])\s?([0-9]{1,2})\2\s?([0-9]{4}|[0-9]{2})")
_WEEKDAY = r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs?)?|fri|sat(?:ur)?|sun)(?:day)?\.?,?\s+)?"
_DAY_MONTH = re.compile(
    _WEEKDAY + r"(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?\.?[\s-]*(?P<month>[a-z]{3,9})\.?,?[\s-]*(?P<year>[0-9]{4}|[0-9]{2})",
    re.IGNORECASE,
)
_MONTH_DAY = re.compile(
    _WEEKDAY + r"(?P<month>[a-z]{3,9})\.?\s+(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?,?\s+(?P<year>[0-9]{4})", re.IGNORECASE
)
_YEAR_AT_END = re.compile(r"(.*[a-z].*?\s)([0-9]{1,2}:[0-9]{2}:[0-9]{2})\s+([0-9]{4})", re.IGNORECASE)
"""The form of C's `ctime`: Sun Mar 31 10:00:00 2024."""
_MORE_DIGITS = re.compile(r"([.][0-9]{6})[0-9]+")
_LONGEST = 50
"""Most characters of a date."""
_FEW = 50
"""Number of cells after which a column without any date or time is taken for words."""
_SPRING = "january", "february", "march", "april", "may", "june"
_AUTUMN = "july", "august", "september", "october", "november", "december"
_MONTHS = {"sept": 9} | {
    name[:letters]: number for number, name in enumerate((*_SPRING, *_AUTUMN), start=1) for letters in (3, 9)
}
"""Names of months in English only; other languages are not guessed."""


@dataclass(frozen=True)
class Moments:
    """The distinct cells of a column read as dates or times. `numbers`, `wrong`: as in `numbers.Reading`.

    `kind`: "date" or "time". `either`: position of a cell that may be two dates if no other cell
    decides; -1: none.
    """

    kind: str
    numbers: Array
    wrong: Array
    either: int = -1


def read_moments(text: Text, order: Order = "auto") -> Moments:
    """Read the cells of a column as dates or as times of day, whichever fits more rows."""
    missing = np.array([value.casefold() in MISSING_WORDS for value in text.values], dtype=bool)
    known = [value for value, gone in zip(text.values, missing, strict=True) if not gone]
    slashed = [found for value in known if (found := _year_last(value))]
    day_first = _day_first(slashed, order)
    readers: dict[str, Callable[[str], float]] = {"date": lambda value: _date(value, day_first is not False), "time": _time}
    if all(np.isnan(reader(value)) for value in known[:_FEW] for reader in readers.values()):
        return Moments("date", np.full(len(text.values), np.nan), ~missing)
    rows = text.counts()
    read = [_read(kind, text.values, missing, reader) for kind, reader in readers.items()]
    best = max(read, key=lambda moments: int(rows[~moments.wrong & ~missing].sum()))
    doubtful = [i for i, value in enumerate(text.values) if day_first is None and best.kind == "date" and _is_two_dates(value)]
    return Moments(best.kind, best.numbers, best.wrong, doubtful[0] if doubtful else -1)


def _read(kind: str, values: list[str], missing: Array, reader: Callable[[str], float]) -> Moments:
    numbers = np.array(
        [np.nan if gone else reader(value) for value, gone in zip(values, missing, strict=True)], dtype=np.float64
    )
    return Moments(kind, numbers, np.isnan(numbers) & ~missing)


def _day_first(dates: list[re.Match[str]], order: Order) -> bool | None:
    """Return whether the day comes first in 3/4/2024; None if the cells do not show it. Points mean day first, as in German."""
    if order != "auto":
        return order == "day-first"
    if all(found[2] == "." for found in dates):  # also if there are none
        return True
    firsts, seconds = ([int(found[part]) for found in dates] for part in (1, 3))
    if (max(firsts) > 12) != (max(seconds) > 12):
        return max(firsts) > 12
    return None


def _year_last(value: str) -> re.Match[str] | None:
    tail = _TAIL.fullmatch(value)
    return _YEAR_LAST.fullmatch(tail["date"]) if tail else None


def _is_two_dates(value: str) -> bool:
    found = _year_last(value)
    return found is not None and found[2] != "." and found[1].lstrip("0") != found[3].lstrip("0")


def _date(value: str, day_first: bool) -> float:
    """Return days since 1970; NaN for a cell that is not a date."""
    try:
        moment = _moment(value, day_first)
    except (ValueError, OverflowError):
        return float("nan")
    if moment is None:
        return float("nan")
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH).total_seconds() / 86400


def _moment(value: str, day_first: bool) -> datetime | None:
    if not value[:1].isalnum() or len(value) > _LONGEST:
        return None
    if found := _COMPACT.fullmatch(value):
        year, month, day, hour, minute, second, zone = found.groups("")
        value = f"{year}-{month}-{day}T{hour}:{minute}:{second or '00'}{zone}"
    if _ISO.fullmatch(value):
        return _iso(value)
    tail = _TAIL.fullmatch(_YEAR_AT_END.sub(r"\1\3 \2", value))
    on = _day(tail["date"], day_first) if tail else None
    if not tail or not on or not tail["time"]:
        return on
    return (datetime.combine(on, _clock(tail["time"])) - _offset(tail["zone"] or "Z")).replace(tzinfo=UTC)


def _day(value: str, day_first: bool) -> datetime | None:
    if re.fullmatch(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}", value):
        return _iso(value)
    if found := _DAY_LAST.fullmatch(value):
        return datetime(int(found[1]), int(found[3]), int(found[4]))
    if found := _YEAR_LAST.fullmatch(value):
        first, second = int(found[1]), int(found[3])
        day, month = (first, second) if day_first else (second, first)
        return datetime(_year(found[4]), month, day)
    if found := _WEEK.fullmatch(value):
        return datetime.fromisocalendar(int(found[1]), int(found[2]), int(found[3] or 1))
    if found := _DAY_MONTH.fullmatch(value) or _MONTH_DAY.fullmatch(value):
        number = _MONTHS.get(found["month"].lower())
        return datetime(_year(found["year"]), number, int(found["day"])) if number else None
    return None


def _year(digits: str) -> int:
    """Return the year; two digits are read as POSIX does."""
    return int(digits) + (0 if len(digits) == 4 else 2000 if int(digits) < 69 else 1900)


def _offset(zone: str) -> timedelta:
    digits = zone.lstrip("+-").replace(":", "")
    if not digits.isdigit():
        return timedelta()
    east = timedelta(hours=int(digits[:2]), minutes=int(digits[2:] or 0))
    return -east if zone[0] == "-" else east


def _iso(value: str) -> datetime:
    date, _, rest = value.replace("UTC", "Z").replace("GMT", "Z").replace("T", " ").partition(" ")
    date = "-".join(part.zfill(2) for part in date.split("-"))
    rest = rest.replace(",", ".").replace(" ", "")
    if rest[1:2] == ":":
        rest = f"0{rest}"
    # Python keeps microseconds; further digits are cut.
    rest = _MORE_DIGITS.sub(r"\1", rest)
    return datetime.fromisoformat(f"{date} {rest}".strip())


def _time(value: str) -> float:
    """Return hours since midnight; NaN for a cell that is not a time of day."""
    if not _TIME.fullmatch(value):
        return float("nan")
    try:
        found = _clock(value)
    except ValueError:
        return float("nan")
    return found.hour + found.minute / 60 + (found.second + found.microsecond / 1e6) / 3600


def _clock(value: str) -> time:
    letters = "".join(filter(str.isalpha, value)).upper()
    half, digits = letters, value.upper().partition(letters[0])[0].strip() if letters else value
    hours, _, rest = _MORE_DIGITS.sub(r"\1", digits.replace(",", ".")).partition(":")
    if half and not 1 <= int(hours) <= 12:
        raise ValueError(value)
    hour = int(hours) % 12 + 12 * (half == "PM") if half else int(hours)
    return time.fromisoformat(f"{hour:02d}:{rest}")


def of_typed(column: Array) -> Array:
    """Return datetime64 (as days since 1970) or timedelta64 (as days) of any unit as float64 [rows]; NaT becomes NaN."""
    whole = column.astype("datetime64[us]" if column.dtype.kind == "M" else "timedelta64[us]")
    numbers = whole.astype(np.int64) / 86_400_000_000
    return np.where(np.isnat(whole), np.nan, numbers)


def cyclic(name: str, kind: str, numbers: Array) -> dict[str, Array]:
    """Return sine and cosine of the place in the day, and for dates also in the week and in the year of 365.2425 days.

    NaN stays.
    """
    periods = {"day": 24.0} if kind == "time" else {"day": 1.0, "week": 7.0, "year": 365.2425}
    turns = {period: 2 * pi * numbers / length for period, length in periods.items()}
    return {
        f"{name} ({period}, {word})": function(turn)
        for period, turn in turns.items()
        for word, function in (("sine", np.sin), ("cosine", np.cos))
    }
