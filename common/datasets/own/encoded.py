"""Columns that a frozen encoder turns into features: texts, pictures, or all numbers of a row.

Features have unit length. With a scale that all tasks share they are moved by the mean of the training rows and brought to
unit length again, which makes what all users' examples have in common vanish (a text's features say first of all that it is
a sentence). They then get the length of a row of sixteen standardised numbers, so rates that suit tables suit them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from quickbloom.common.datasets.own.files.image_arrays import NO_SCALE, value_of_white
from quickbloom.common.datasets.own.files.pictures import ArrayPictures, Cuts, Pictures, Sized
from quickbloom.common.datasets.own.scales import Moments
from quickbloom.common.datasets.own.text import Array, Text
from quickbloom.common.encoders import Encoder, load_encoder
from quickbloom.common.encoders.base import digest_of, existing
from quickbloom.common.encoders.encoding import Rows, Texts, encode_all
from quickbloom.common.encoders.tokens import FILE, Tokenizer
from quickbloom.common.errors import DataError

FEATURES, TOKENS = "features", "tokens"
"""Kinds of a column that is encoded, and of a text as token ids."""
LENGTH = 4.0
"""Length of an example's features as inputs: the square root of 16."""
_LEAST = 1e-12


@dataclass(frozen=True)
class Encoded:
    """A column of features. `features`: float32 [different, size], of unit length; `codes`: each row's, -1: an empty cell.

    `contents`: a key of each different example, by which equal rows are known.
    """

    features: Array
    codes: Array
    contents: list[str]

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def size(self) -> int:
        return int(self.features.shape[1])

    @property
    def text(self) -> Text:
        """The column as text, equal for equal examples."""
        return Text(self.codes, self.contents)

    def take(self, rows: Array) -> "Encoded":
        """Return the column restricted to `rows`."""
        return Encoded(self.features, self.codes[rows], self.contents)

    def moments(self, name: str, rows: Array) -> dict[str, Moments]:
        """Return what rows show of each feature, by `parts`."""
        known = self.features[self.codes[rows][self.codes[rows] >= 0]].astype(np.float64)
        if not len(known):
            return dict.fromkeys(parts(name, self.size), Moments())
        means = known.mean(axis=0)
        squares = np.square(known - means).sum(axis=0)
        every = zip(parts(name, self.size), means, squares, strict=True)
        return {part: Moments(len(known), float(mean), float(square)) for part, mean, square in every}

    def sum(self, rows: Array) -> tuple[Array, Array]:
        """Return (sum of the features of these rows, float64 [size]; the number of those that are no empty cells, [1])."""
        known = self.features[self.codes[rows][self.codes[rows] >= 0]].astype(np.float64)
        return known.sum(axis=0), np.array([float(len(known))])

    def mean(self, rows: Array) -> Array:
        """Return the mean of the features of these rows, float64 [size], of norm at most 1; zeros if all cells are empty."""
        total, count = self.sum(rows)
        found: Array = total / max(float(count[0]), 1.0)
        return found

    def inputs(self, mean: Sequence[float]) -> Array:
        """Return float32 inputs [rows, size]: moved by `mean` (empty: not moved), of `LENGTH`; 0 for an empty cell."""
        there = self.codes >= 0
        result = np.zeros((len(self.codes), self.size), dtype=np.float32)
        found = self.features[self.codes[there]]
        result[there] = LENGTH * (unit_length(found - np.asarray(mean, dtype=np.float32)) if len(mean) else found)
        return result


@dataclass(frozen=True)
class Tokens:
    """A column of texts as token ids, for a model that reads text itself. `ids`: int64 [different, length]; `codes`: as above.

    `contents`: the different texts; `vocabulary`: how many ids there are.
    """

    ids: Array
    codes: Array
    contents: list[str]
    vocabulary: int

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def size(self) -> int:
        return int(self.ids.shape[1])

    @property
    def text(self) -> Text:
        """The column as text, equal for equal texts."""
        return Text(self.codes, self.contents)

    def take(self, rows: Array) -> "Tokens":
        """Return the column restricted to `rows`."""
        return Tokens(self.ids, self.codes[rows], self.contents, self.vocabulary)

    def inputs(self) -> Array:
        """Return int64 [rows, length]; an empty cell is the empty text, the last of `ids`."""
        found: Array = self.ids[self.codes]
        return found


@lru_cache(maxsize=4)
def find_tokenizer(directory: str) -> Tokenizer:
    """Return the tokenizer in a directory. Raises ConfigError."""
    return Tokenizer(existing(directory, directory) / FILE)


def token_facts(directory: str, length: int) -> dict[str, Any]:
    """Return what all nodes must agree on about a tokenizer: `Schema.encoder`."""
    tokenizer = find_tokenizer(directory)
    return {"digest": digest_of({"vocabulary": tokenizer.vocabulary}, tokenizer.file), "size": length}


def tokenized(directory: str, length: int, text: Text) -> Tokens:
    """Return a column of texts as token ids, each cut at `length`. Raises ConfigError."""
    tokenizer = find_tokenizer(directory)
    ids, _ = tokenizer.padded([*text.values, ""], length)
    return Tokens(ids, text.codes, text.values, tokenizer.vocabulary)


def facts_of(encoder: Encoder) -> dict[str, Any]:
    """Return what all nodes must agree on about the encoder: `Schema.encoder`."""
    return {"digest": encoder.digest, "size": encoder.size}


def unit_length(features: Array) -> Array:
    """Return every row at length 1; a row of nothing but zeros stays so."""
    found: Array = features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=_LEAST)
    return found


def most_norm(columns: int) -> float:
    """Return the largest norm that a task's means of so many columns of features have together: features have length 1."""
    return math.sqrt(columns)


def clipped(vector: Array, norm: float) -> Array:
    """Return the vector, scaled down to a norm if it is longer."""
    found: Array = vector * min(1.0, norm / max(float(np.linalg.norm(vector)), _LEAST))
    return found


def parts(name: str, size: int) -> list[str]:
    """Return the names of a column's features, by which their means are told."""
    return [f"{name}[{place}]" for place in range(size)]


def mean_of(name: str, scales: Mapping[str, Sequence[float]]) -> list[float]:
    """Return the mean of a column's features among the scales that all tasks share; [] if there are none."""
    found: list[float] = []
    while (part := f"{name}[{len(found)}]") in scales:
        found.append(float(scales[part][0]))
    return found


def encode_text(setting: str, pooling: str, text: Text) -> Encoded:
    """Return a column of texts as features; each different text is encoded once. Raises ConfigError or DataError."""
    encoder = load_encoder(setting, pooling)
    if encoder.kind != "text":
        raise DataError(
            f"`own.encoder={setting}` reads {encoder.kind}, and `own.text` names columns of text: choose an encoder of text"
        )
    return Encoded(unit_length(encode_all(encoder, Texts(text.values))), text.codes, text.values)


def encode_pictures(setting: str, pooling: str, column: Any, rows: Array | None = None) -> Encoded:
    """Return a column of pictures as features. `column`: `Pictures`, or an array of images. Raises ConfigError or DataError."""
    encoder = load_encoder(setting, pooling)
    if encoder.kind != "images":
        raise DataError(f"`own.encoder={setting}` reads {encoder.kind}, and these data are images: choose an encoder of images")
    pictures = _pictures_of(column, rows)
    found = encode_all(encoder, Sized(pictures, encoder.shorter_side))
    keys = Text.of(pictures.key(at).hex() for at in range(len(pictures)))
    first = np.unique(keys.codes, return_index=True)[1]
    return Encoded(unit_length(found[first]), keys.codes, keys.values)


def encode_views(setting: str, pooling: str, column: Any, rows: Array, views: int, *, flips: bool) -> Array:
    """Return the features float32 [views - 1, rows, size] of further views of pictures, of unit length; see `Cuts`.

    Each is encoded once. Raises ConfigError or DataError.
    """
    encoder, pictures = load_encoder(setting, pooling), _pictures_of(column, rows)
    every = [Cuts(pictures, encoder.shorter_side, view, flips=flips) for view in range(1, views)]
    return np.stack([unit_length(encode_all(encoder, cuts)) for cuts in every])


def _pictures_of(column: Any, rows: Array | None) -> Pictures:
    """Return rows of a column, or of an array of images, as pictures. Raises DataError."""
    if isinstance(column, Pictures):
        pictures: Pictures = column
    elif white := value_of_white(column):
        pictures = ArrayPictures(column, white)
    else:
        raise DataError(f"the images cannot be encoded: {NO_SCALE}")
    return pictures if rows is None else pictures.take(rows)


def encode_numbers(setting: str, pooling: str, columns: Mapping[str, Array], path: str) -> Encoded:
    """Return the numbers [rows] of all columns together as features. Raises ConfigError or DataError."""
    encoder = load_encoder(setting, pooling)
    wanted = getattr(encoder, "columns", 0)
    if encoder.kind != "numbers" or wanted not in (0, len(columns)):
        reads = f"{wanted} numbers" if encoder.kind == "numbers" else encoder.kind
        raise DataError(
            f"`own.encoder={setting}` reads {reads}, and the data '{path}' have {len(columns)} columns of numbers to encode: "
            "name them in the encoder's order with `own.features`, or columns of text with `own.text`"
        )
    numbers = np.stack(list(columns.values()), axis=1).astype(np.float32)
    if (missing := np.isnan(numbers)).any():
        row, column = np.argwhere(missing)[0]
        raise DataError(
            f"the encoder needs a number in every cell, row {row + 1} has none in `{list(columns)[column]}`: fill it in"
        )
    different, first, codes = np.unique(numbers, axis=0, return_index=True, return_inverse=True)
    keys = [row.tobytes().hex() for row in different]
    return Encoded(unit_length(encode_all(encoder, Rows(different, (first + 1).tolist()))), codes.reshape(-1), keys)
