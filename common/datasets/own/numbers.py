"""Numbers as people and spreadsheets write them: 1,234.5 and 1.234,5, 5.3%, $1,200.00, (12.00 €).

A column is read by one convention that all its cells follow, or not at all. If all cells fit two
conventions, such as 1,234, the other columns of the file decide.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from quickbloom.common.datasets.own.text import MISSING_WORDS, Array, Text

_CURRENCY = (
    r"(?:US|R|A|AU|C|CA|HK|NZ|S|NT)\$|Rs\.?|[$€£¥₹₽₩₺₪₫฿₴₦]|USD|EUR|GBP|CHF|JPY|CNY|INR|AUD|CAD|SEK|NOK|DKK|PLN|CZK|BRL|MXN|KRW|"
    r"kr\.?|zł|Kč|Fr\.?"
)
_DRESSED = re.compile(
    rf"(?P<minus>[+-]?)\s*(?P<before>{_CURRENCY})?\s*(?P<inner>[+-]?)\s*"
    rf"(?P<body>[0-9.,][0-9.,' ]*(?:[eE][+-]?[0-9]+)?)\s*(?P<after>{_CURRENCY}|%)?"
)
_BRACKETED = re.compile(rf"(?P<before>{_CURRENCY})?\s*\((?P<body>[^()]*)\)\s*(?P<after>{_CURRENCY})?")
_EXPONENT = r"(?:[eE][+-]?[0-9]+)?"
_LAKHS = r"|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}"
_POINT = re.compile(rf"(?:[1-9][0-9]{{0,2}}([,' ])[0-9]{{3}}(?:\1[0-9]{{3}})*{_LAKHS}|[0-9]*)(?:\.[0-9]*)?{_EXPONENT}")
_COMMA = re.compile(rf"(?:[1-9][0-9]{{0,2}}([.' ])[0-9]{{3}}(?:\1[0-9]{{3}})*|[0-9]*)(?:,[0-9]*)?{_EXPONENT}")
_SIGNS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{NO-BREAK SPACE}": " ",
        "\N{NARROW NO-BREAK SPACE}": " ",
        "\N{THIN SPACE}": " ",
        "\N{FIGURE SPACE}": " ",
        "\N{EN DASH}": "-",
        "\N{NON-BREAKING HYPHEN}": "-",
        "\N{FULLWIDTH HYPHEN-MINUS}": "-",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    }
)
_TRUTHS = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class Reading:
    """The distinct cells of a column read as numbers.

    `numbers`: float64 [values], NaN for a missing cell or a non-number. `wrong`: bool [values],
    True for non-numbers. `how`: the convention in words, "" for plain numbers. `decimal`: the
    decimal sign if the cells determine it, else "". `either`: position of a cell that may be two
    numbers if no other cell decides; -1: none.
    """

    numbers: Array
    wrong: Array
    how: str = ""
    decimal: str = ""
    either: int = -1


def read_numbers(text: Text, decimal: str = ".") -> Reading:
    """Read the cells of a column. `decimal`: the file's decimal sign, "." or ","; "" if its columns disagree."""
    missing = np.array([value.casefold() in MISSING_WORDS for value in text.values], dtype=bool)
    plain = _plain(text.values, missing)
    if plain is not None and (decimal != "," or not _grouped_by_points(text.values)):
        return Reading(plain, np.zeros(len(plain), dtype=bool), decimal=_plain_decimal(text.values))
    if (truths := _truths(text.values, missing)) is not None:
        return Reading(truths, np.zeros(len(truths), dtype=bool), "True is 1, False 0")
    return _by_convention(text, missing, decimal)


def decimal_sign(columns: Iterable[Text], default: str) -> str:
    """Return the decimal sign that a file's number columns determine; "" if they disagree, `default` if none does."""
    found = {reading.decimal for reading in map(read_numbers, columns) if not reading.wrong.any()} - {""}
    return found.pop() if len(found) == 1 else "" if found else default


def _plain(values: list[str], missing: Array) -> Array | None:
    """Return the numbers if all cells are written as programs do, which NumPy reads in one call; else None."""
    cells = ["nan" if gone else value for value, gone in zip(values, missing, strict=True)]
    if any("_" in cell for cell in cells):
        return None
    try:
        return np.array(cells, dtype=object).astype(np.float64)
    except (ValueError, OverflowError):
        return None


def _plain_decimal(values: list[str]) -> str:
    return "." if any("." in value and not _COMMA.fullmatch(value.lstrip("+-")) for value in values) else ""


def _grouped_by_points(values: list[str]) -> bool:
    """Return whether every point in these plain numbers could separate thousands: 1.234, 12.000."""
    pointed = [value.lstrip("+-") for value in values if "." in value]
    return bool(pointed) and all(_COMMA.fullmatch(value) for value in pointed)


def _truths(values: list[str], missing: Array) -> Array | None:
    """Return 1 for True and 0 for False if the cells hold nothing else but 1 and 0; else None."""
    known = {**_TRUTHS, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}
    found = [np.nan if gone else known.get(value.casefold()) for value, gone in zip(values, missing, strict=True)]
    return None if None in found or all(missing) else np.array(found, dtype=np.float64)


@dataclass(frozen=True)
class _Cell:
    """A number as written: its digits and the signs between them, whether it is negative, and its unit."""

    body: str
    negative: bool
    unit: str


def _undressed(value: str) -> _Cell | None:
    value = value.translate(_SIGNS).strip()
    bracketed = _BRACKETED.fullmatch(value)
    if bracketed:  # the currency may be inside or outside: ($5), $(5)
        value = f"{bracketed['before'] or ''}{bracketed['body'].strip()}{bracketed['after'] or ''}"
    found = _DRESSED.fullmatch(value)
    if found is None:
        return None
    unit, signed = (found["before"] or found["after"] or "").rstrip("."), bool(found["minus"] or found["inner"])
    if (found["before"] and found["after"]) or (found["minus"] and found["inner"]) or (bracketed and (signed or unit == "%")):
        return None
    body = found["body"].rstrip(" '")
    if bracketed and not unit and body.isdigit():
        return None  # (5) may be a footnote; (5.00) is a negative number as accountants write it
    return (
        _Cell(body, bool(bracketed) or "-" in (found["minus"], found["inner"]), unit) if any(map(str.isdigit, body)) else None
    )


def _by_convention(text: Text, missing: Array, decimal: str) -> Reading:
    rows = text.counts() * ~missing
    cells = [None if gone else _undressed(value) for value, gone in zip(text.values, missing, strict=True)]
    unit = _most(rows, [cell.unit if cell else "" for cell in cells])
    # Amounts may omit their currency, but a number without a sign among percentages is ambiguous: 5 % or 0.05.
    units = {unit} if unit in ("", "%") else {unit, ""}
    bodies = [cell.body if cell and (cell.unit in units or not cell.body.strip("0.,")) else None for cell in cells]
    points, commas = _fitting(bodies, _POINT), _fitting(bodies, _COMMA)
    clear = _clear(points, commas, rows)
    both = [i for i, body in enumerate(bodies) if points[i] and commas[i] and body and set(body) & {",", "."}]
    sign = clear or decimal or "."
    good = points if sign == "." else commas
    numbers = [_value(cell, sign) if cell and fits else np.nan for cell, fits in zip(cells, good, strict=True)]
    how = _in_words([body for body, fits in zip(bodies, good, strict=True) if body and fits], sign, unit)
    if any(fits and "(" in value for value, fits in zip(text.values, good, strict=True)):
        how += ", negative in brackets" if how else "negative in brackets"
    either = both[0] if both and not clear else -1
    return Reading(np.array(numbers, dtype=np.float64), ~good & ~missing, how, clear, either)


def _fitting(bodies: list[str | None], style: re.Pattern[str]) -> Array:
    return np.array([body is not None and style.fullmatch(body) is not None for body in bodies], dtype=bool)


def _most(rows: Array, units: list[str]) -> str:
    """Return the unit of most rows; "" if no row has one."""
    found: Counter[str] = Counter()
    for count, unit in zip(rows, units, strict=True):
        if unit:
            found[unit] += int(count)
    return found.most_common(1)[0][0] if found else ""


def _clear(points: Array, commas: Array, rows: Array) -> str:
    """Return the decimal sign by the cells that fit only one convention, the more frequent if both occur; "" if undecided."""
    only_point, only_comma = int(rows[points & ~commas].sum()), int(rows[commas & ~points].sum())
    if only_point == only_comma == 0:
        return ""
    return "." if only_point >= only_comma else ","


def _value(cell: _Cell, sign: str) -> float:
    digits = "".join(mark for mark in cell.body if mark.isalnum() or mark in "+-" or mark == sign)
    return (-1 if cell.negative else 1) * float(digits.replace(",", "."))


def _in_words(bodies: list[str], sign: str, unit: str) -> str:
    between = {mark for body in bodies for mark in body if mark in ".,' "} - {sign}
    names = {",": "commas", ".": "points", "'": "apostrophes", " ": "blanks"}
    said = ["decimal commas"] if sign == "," and any("," in body for body in bodies) else []
    said += [f"{names[mark]} between thousands" for mark in sorted(between)]
    return ", ".join(said + ([f"in {unit}"] if unit else []))
