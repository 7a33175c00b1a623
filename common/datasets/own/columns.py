"""Kinds of a file's columns (numbers, dates, times, categories), and the columns as inputs of a model.

A kind is derived from all cells of the column, or is the one that all nodes agreed on (`Schema`).
In the second case the cells of another file are read as that kind, whatever they look like.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.datasets.own import encoded
from quickbloom.common.datasets.own.dates import Order, cyclic, of_typed, read_moments
from quickbloom.common.datasets.own.encoded import FEATURES, TOKENS, Encoded, Tokens
from quickbloom.common.datasets.own.files.parquet_file import Unusable
from quickbloom.common.datasets.own.files.pictures import Pictures
from quickbloom.common.datasets.own.files.tables import PIXELS, Table
from quickbloom.common.datasets.own.numbers import Reading as Numbers
from quickbloom.common.datasets.own.numbers import read_numbers
from quickbloom.common.datasets.own.options import OwnOptions
from quickbloom.common.datasets.own.text import MISSING_IN_TEXT, Array, Text, as_text
from quickbloom.common.datasets.own.vocabulary import Places, places, vocabulary
from quickbloom.common.encoders import Encoder, load_encoder
from quickbloom.common.errors import DataError, as_told, did_you_mean
from quickbloom.common.files import is_text

NUMBER, DATE, TIME, TEXT, EMPTY = "number", "date", "time", "text", ""
"""Kinds of columns. `EMPTY`: no row holds anything, so the kind is that of the other nodes."""
_KEY, MOST_KEYS = 16, 2**16
"""Characters of a category's key, and most keys of all columns together; each key is an input."""
MOST_OF_A_SCALE = 1e300
"""Largest mean and deviation of a scale: the deviation of a column without any number."""
LARGEST_NUMBER = 1e30
"""Largest absolute value of a number in a column."""

_TYPED = {"M": DATE}
"""Kinds of columns with a typed content. Durations are numbers, of days."""

Inputs = dict[str, Array | Places | Encoded | Tokens]
"""Columns of a model's inputs: float64 numbers (NaN: missing), places among categories, features of an encoder, token
ids, or pixels."""


class MixedColumnError(DataError):
    """A column holds words among numbers: a mistake, or categories that the settings must declare.

    `column`: its name; `found`: its content in words.
    """

    def __init__(self, column: str, kind: str, row: int, word: str, advice: str, how: str = "") -> None:
        """Compose the message. `how`: the number convention of the column, if it has one."""
        cell = f"'{as_told(word, 80)}'"
        self.column = column
        like = f" like the others ({how})" if how else ""
        self.found = f"the column `{column}` holds {kind}s, but row {row} (without the header) holds the text {cell}"
        super().__init__(f"{self.found}: put a {kind} there{like}, leave it empty, or {advice}", cell)


@dataclass(frozen=True)
class Schema:
    """Everything that all nodes agree on about the data.

    `features`: the kind of every input column; `vocabularies`: the keys of each text column.
    `classes`: those of the target, none for a number. `cyclic`: columns of dates or times that also
    give their place in the day. `scales`: mean and deviation of every numeric column over the rows of
    the training tasks, and `target_scale` those of a number to predict; empty if each task has its own. `encoder`: `digest`
    and `size` of the encoder of all columns that are features; {} if there are none.
    """

    target: str
    classes: list[str]
    features: dict[str, str]
    vocabularies: dict[str, list[str]] = field(default_factory=dict)
    cyclic: list[str] = field(default_factory=list)
    scales: dict[str, list[float]] = field(default_factory=dict)
    target_scale: list[float] = field(default_factory=list)
    encoder: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the schema as JSON, equal for equal content."""
        facts = {**vars(self), "features": [list(pair) for pair in self.features.items()]}
        return json.dumps(facts, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Schema":
        """Return the schema in `text`. Raises DataError for any other text."""
        try:
            facts = json.loads(text)
            return cls(**{**facts, "features": dict(facts["features"])}).checked()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise DataError(
                "the description of the data's columns has a form that this release cannot read: make it anew"
            ) from None

    def checked(self) -> "Schema":
        """Return self if all parts have the right type and fit together. Raises TypeError or ValueError."""
        if not all(isinstance(part, list) for part in (self.classes, self.cyclic, *self.vocabularies.values())):
            raise TypeError("classes, cyclic columns and vocabularies are lists")
        texts = [self.target, *self.classes, *self.features, *self.features.values(), *self.cyclic, *self.vocabularies]
        if not all(isinstance(text, str) and is_text(text) for text in texts):
            raise TypeError("a schema is made of text")
        if (
            not set(self.features.values()) <= {NUMBER, DATE, TIME, TEXT, EMPTY, FEATURES, TOKENS}
            or not {*self.cyclic} <= self.features.keys()
        ):
            raise ValueError("every feature has a kind")
        if len(set(self.classes)) < len(self.classes) or any(self.features.get(name) != TEXT for name in self.vocabularies):
            raise ValueError("classes differ, and columns of text have vocabularies")
        keys = [key for listed in self.vocabularies.values() for key in listed]
        if len(keys) > MOST_KEYS or not all(isinstance(key, str) and len(key) == _KEY for key in keys):
            raise ValueError("vocabularies are lists of keys")
        if any(len(set(listed)) < len(listed) for listed in self.vocabularies.values()):
            raise ValueError("the keys of a vocabulary differ")
        scales = [*self.scales.values(), *([self.target_scale] if self.target_scale else [])]
        if not all(
            isinstance(scale, list) and len(scale) == 2 and all(map(_is_finite, scale)) and scale[1] > 0 for scale in scales
        ):
            raise ValueError("a scale is a mean and a deviation above 0")
        if not _is_encoder(self.encoder) or bool(self.encoder) != bool({FEATURES, TOKENS} & {*self.features.values()}):
            raise ValueError("an encoder has a digest and a size, and belongs to columns of features or tokens")
        if TOKENS in self.features.values() and len(self.features) > 1:
            raise ValueError("token ids are the only input")
        if not isinstance(self.scales, dict) or len(self.scales) > MOST_KEYS:
            raise TypeError("scales are by column")
        return self

    @property
    def numeric_inputs(self) -> set[str]:
        """Names of the inputs that are standardised."""
        kinds = {name: kind for name, kind in self.features.items() if kind not in (TEXT, FEATURES, TOKENS) and name != PIXELS}
        places = (cyclic(name, kinds[name], np.array([])) for name in self.cyclic)
        features = (encoded.parts(name, self.encoder["size"]) for name, kind in self.features.items() if kind == FEATURES)
        return {*kinds, *(name for found in (*places, *features) for name in found)}

    @property
    def has_numbers(self) -> bool:
        """Whether there is a column, or a target, to standardise."""
        kinds = {kind for name, kind in self.features.items() if name != PIXELS}
        return not self.classes or FEATURES in kinds or not kinds.isdisjoint((NUMBER, DATE, TIME))


def is_encoded(spec: DataSpec) -> bool:
    """Return whether the inputs of these data are features of a frozen encoder."""
    try:
        found = json.loads(spec.schema) if spec.schema and not spec.tokens else None
    except ValueError:  # a data set of other origin may have any schema
        return False
    return isinstance(found, dict) and bool(found.get("encoder"))


def _is_finite(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= MOST_OF_A_SCALE


def _is_encoder(found: object) -> bool:
    if found == {}:
        return True
    if not isinstance(found, dict) or found.keys() != {"digest", "size"}:
        return False
    digest, size = found["digest"], found["size"]
    is_size = isinstance(size, int) and not isinstance(size, bool) and 0 < size <= MOST_KEYS
    return is_size and isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None


@dataclass(frozen=True)
class Reading:
    """How to read the cells of a file, from the settings. `extra_missing`: in lower case.

    `encoder`, `pooling`, `tokenizer`: those of `own.encoder`, `own.encoder-pooling` and `own.tokenizer`.
    """

    path: str
    order: Order = "auto"
    extra_missing: Collection[str] = ()
    encoder: str = ""
    pooling: str = "auto"
    tokenizer: str = ""


def find_kind(table: Table, name: str, reading: Reading, advice: str = "") -> str:
    """Return the kind of a column from its cells.

    Raises MixedColumnError for a word among numbers or dates; `advice`: the remedy in its message.
    """
    column = usable(table, name)
    if isinstance(column, Text):
        advice = advice or f"declare categories with `--set own.categorical={name}`"
        return _kind_of_text(name, column.without(reading.extra_missing), table.decimal, reading, advice)
    return DATE if column.dtype.kind == "M" else EMPTY if column.ndim == 1 and _is_empty(column) else NUMBER


def _is_empty(column: Array) -> bool:
    return column.dtype.kind == "f" and bool(np.isnan(column).all())


def _kind_of_text(name: str, text: Text, decimal: str, reading: Reading, advice: str) -> str:
    rows, numbers = text.counts(), read_numbers(text, decimal)
    missing = np.isnan(numbers.numbers) & ~numbers.wrong
    known = int(rows[~missing].sum())
    if not known:
        return EMPTY
    if not numbers.wrong.any():
        return NUMBER
    moments = read_moments(text, reading.order)
    if not moments.wrong.any():
        return moments.kind
    for kind, wrong in ((NUMBER, numbers.wrong), (moments.kind, moments.wrong)):
        if 2 * int(rows[wrong].sum()) <= known:  # few words among many numbers are taken for mistakes
            raise _mixed(name, kind, text, wrong, advice, numbers.how if kind == NUMBER else "")
    return TEXT


def _mixed(name: str, kind: str, text: Text, wrong: Array, advice: str, how: str = "") -> MixedColumnError:
    place = min(map(int, np.flatnonzero(wrong)), key=text.first_row)
    return MixedColumnError(name, kind, text.first_row(place) + 1, text.values[place], advice, how)


def usable(table: Table, name: str) -> Text | Array:
    """Return the column `name`. Raises DataError for one that is neither numbers nor text."""
    column = table[name]
    if isinstance(column, Unusable):
        raise DataError(column.reason)
    if isinstance(column, Pictures):
        raise DataError(f"the column `{name}` holds pictures: name columns of text or numbers")
    return column


def of_kind(table: Table, name: str, kind: str, reading: Reading, advice: str = "leave the row out") -> Array | Text:
    """Return a column read as its kind: float64 [rows] for numbers, dates and times; text for categories; pixels unchanged.

    Raises DataError for cells of another kind. `advice`: an alternative remedy in its message.
    """
    column = usable(table, name)
    if kind == TEXT:
        return categories(column, reading.extra_missing)
    if isinstance(column, Text):
        return _read(table, name, column.without(reading.extra_missing), kind or NUMBER, reading, advice)
    found = _TYPED.get(column.dtype.kind, NUMBER)
    if kind not in (found, EMPTY):
        what = "durations" if column.dtype.kind == "m" else f"{found}s"
        if not (column.dtype.kind == "f" and _is_empty(column)):
            raise DataError(f"the column `{name}` of '{reading.path}' must hold {kind}s, as it did in training, got {what}")
    return of_typed(column) if column.dtype.kind in "mM" else np.asarray(column, dtype=np.float64)


def categories(column: Text | Array, extra_missing: Collection[str] = ()) -> Text:
    """Return a column as categories; equal cells give equal text, whatever else the file holds."""
    return as_text(column).without({*MISSING_IN_TEXT, *extra_missing})


def _read(table: Table, name: str, text: Text, kind: str, reading: Reading, advice: str) -> Array:
    found = read_numbers(text, table.decimal) if kind == NUMBER else read_moments(text, reading.order)
    number = kind == NUMBER
    if not number and found.kind != kind and not found.wrong.all():  # type: ignore[union-attr]
        raise DataError(f"the column `{name}` of '{reading.path}' must hold {kind}s, as it did in training, got something else")
    if found.wrong.any():
        if found.wrong.all() or np.isnan(found.numbers).all():
            raise DataError(f"the column `{name}` of '{reading.path}' must hold {kind}s, as it did in training, got text")
        raise _mixed(name, kind, text, found.wrong, advice, found.how if isinstance(found, Numbers) else "")
    if found.either >= 0 and (not number or not table.decimal):
        raise DataError(*_either(name, text, found.either, number=number))
    return text.spread(found.numbers, np.nan)


def _either(name: str, text: Text, place: int, *, number: bool) -> tuple[str, str]:
    cell, row = f"'{text.values[place]}'", text.first_row(place) + 1
    mend = (
        "write it without a sign between thousands, or give every column of the file the same decimal sign"
        if number
        else "write dates as 2024-03-31, or set `own.date-order` to day-first or month-first"
    )
    what = "numbers" if number else "dates"
    return f"the column `{name}` holds in row {row} (without the header) {cell}, which may be two {what}: {mend}", cell


def make_inputs(table: Table, schema: Schema, reading: Reading, rows: Array | None = None) -> Inputs:
    """Return the schema's features, of all rows or of `rows`. Raises DataError for cells that do not fit."""
    features, result = _encoded(table, schema, reading, rows), Inputs()
    for name, kind in schema.features.items():
        require(table, name, reading.path, typed=False)
        if kind == TOKENS:
            result[name] = _tokens(table, name, schema, reading, rows)
            continue
        if kind == FEATURES:
            result |= {name: features[name]} if name in features else {}
            continue
        column = _input(table, name, kind, reading)
        column = column if rows is None else column.take(rows) if isinstance(column, Text) else column[rows]
        if isinstance(column, Text):
            result[name] = places(name, column, schema.vocabularies.get(name, []))
            continue
        refuse_infinite(name, column)
        result[name] = column
        if name in schema.cyclic:
            result |= cyclic(name, kind, column)
    return result


def _tokens(table: Table, name: str, schema: Schema, reading: Reading, rows: Array | None) -> Tokens:
    digest, length = schema.encoder["digest"], schema.encoder["size"]
    if not reading.tokenizer:
        raise DataError(f"the inputs come from a tokenizer with the SHA-256 {digest}: set `own.tokenizer` to its directory")
    if (found := encoded.token_facts(reading.tokenizer, length)["digest"]) != digest:
        raise DataError(
            f"the tokenizer in '{reading.tokenizer}' has the SHA-256 {found}, the other nodes' has {digest}: all need "
            "the same file"
        )
    text = categories(usable(table, name), reading.extra_missing)
    return encoded.tokenized(reading.tokenizer, length, text if rows is None else text.take(rows).mapped(str))


def _encoded(table: Table, schema: Schema, reading: Reading, rows: Array | None) -> Inputs:
    """Return the features of all columns that are encoded: one for each of text or pictures, one for all numbers together."""
    named = [name for name, kind in schema.features.items() if kind == FEATURES]
    if not named:
        return {}
    encoder = find_encoder(reading, schema)
    for name in named:
        require(table, name, reading.path, typed=False)
    setting = reading.encoder, reading.pooling
    if encoder.kind == "numbers":
        columns = {name: of_kind(table, name, NUMBER, reading) for name in named}
        chosen = {name: column if rows is None else column[rows] for name, column in columns.items()}  # type: ignore[index]
        return {named[0]: encoded.encode_numbers(*setting, chosen, reading.path)}  # type: ignore[arg-type]
    found: Inputs = {}
    for name in named:
        if name == PIXELS:
            found[name] = encoded.encode_pictures(*setting, table[name], rows)
        else:
            text = categories(usable(table, name), reading.extra_missing)
            found[name] = encoded.encode_text(*setting, text if rows is None else text.take(rows).mapped(str))
    return found


def find_encoder(reading: Reading, schema: Schema | None = None) -> Encoder:
    """Return the encoder of the settings. Raises DataError if the nodes agreed on another one."""
    if not reading.encoder:
        digest = schema.encoder["digest"] if schema else "?"
        raise DataError(f"the inputs come from an encoder with the SHA-256 {digest}: say where it is with `--encoder`")
    found = load_encoder(reading.encoder, reading.pooling)
    if schema and schema.encoder and found.digest != schema.encoder["digest"]:
        raise DataError(
            f"the encoder '{reading.encoder}' has the SHA-256 {found.digest}, the other nodes' has {schema.encoder['digest']}: "
            "all need the same files and the same `own.encoder-pooling`"
        )
    return found


def _input(table: Table, name: str, kind: str, reading: Reading) -> Array | Text:
    if name == PIXELS:
        return usable(table, name)
    if kind == EMPTY:  # no model has learned from this column, whatever another file holds there
        return np.full(table.rows, np.nan)
    return of_kind(table, name, kind, reading)


def keys_of_each(limit: int, columns: int) -> int:
    """Return how many keys each of `columns` text columns may have, so that all have at most `MOST_KEYS`."""
    return max(1, min(limit, MOST_KEYS // max(columns, 1)))


def make_vocabulary(table: Table, name: str, reading: Reading, least: int, most: int) -> list[str]:
    """Return the keys of the values of a category column."""
    return vocabulary(name, categories(usable(table, name), reading.extra_missing), least, most)


def refuse_infinite(name: str, column: Array) -> None:
    """Raise DataError if a column holds infinity, or numbers whose squares would be infinite."""
    if np.isinf(column).any():
        raise DataError(f"the column `{name}` holds infinite values: remove them or leave them empty")
    if (np.abs(column) > LARGEST_NUMBER).any():
        raise DataError(f"the column `{name}` holds numbers beyond {LARGEST_NUMBER:g}: give it in a larger unit")


def refuse_target(column: Array) -> None:
    """Raise DataError for numbers that no model can be trained on."""
    if np.isinf(column).any():
        raise DataError("the target holds infinite values: remove them or leave them empty")
    if (np.abs(column) > LARGEST_NUMBER).any():
        raise DataError(f"the target holds numbers beyond {LARGEST_NUMBER:g}: give it in a larger unit")


def require(columns: Mapping[str, Any], name: str, path: str, *, typed: bool = True) -> None:
    """Raise DataError unless the column exists. `typed`: a person typed the name and may have misspelled it."""
    if name not in columns:
        hint = (did_you_mean(name, columns) if typed else "") or f": they have {', '.join(list(columns)[:20])}"
        raise DataError(f"the data '{path}' have no column `{name}`{hint}")


def read_time(table: Table, schema: Schema, options: OwnOptions, reading: Reading) -> Array | None:
    """Return the moment of every row, float64 [rows], NaN where the cell is empty; None if no column is named.

    Its kind is that which all nodes agreed on, if it is an input as well. Raises DataError for cells that are no
    number, date or time.
    """
    name = options.time_column
    if not name:
        return None
    agreed = schema.features.get(name)
    kind = agreed if agreed in (NUMBER, DATE, TIME) else find_kind(table, name, reading, "leave the row out")
    if kind not in (NUMBER, DATE, TIME, EMPTY) or usable(table, name).ndim != 1:
        raise DataError(
            f"`--time` must name a column of numbers, dates or times, `{name}` of '{options.path}' holds something else: "
            "write dates as 2024-03-31, or number the rows of each task in order"
        )
    moments = of_kind(table, name, kind, reading)
    assert isinstance(moments, np.ndarray)
    refuse_infinite(name, moments)
    return moments
