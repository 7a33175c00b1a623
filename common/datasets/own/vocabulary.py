"""The categories of a text column: which input stands for which value.

A vocabulary is agreed on by all nodes, and values may be what nobody else is to read. So it holds keys, of 64 bits by a hash:
whoever has a value finds its place, whoever has the vocabulary must guess. 10,000 values share a key with a chance of 3e-12.
A column becomes one input for each key in its order, one for any other value, and one for a missing value.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from quickbloom.common.datasets.own.text import Array, Text

OTHER, MISSING = "other", "missing"


@dataclass(frozen=True)
class Places:
    """A text column as positions among its inputs: `at`, int64 [rows], of 0..size-1."""

    at: Array
    size: int

    def __len__(self) -> int:
        return len(self.at)

    def take(self, rows: Array) -> "Places":
        """The same column of some rows."""
        return Places(self.at[rows], self.size)

    def one_hot(self) -> Array:
        """float32 [rows, size]."""
        result: Array = (self.at[:, None] == np.arange(self.size)).astype(np.float32)
        return result


def key(column: str, value: str) -> str:
    """What a vocabulary holds for a value of the column: 16 hexadecimal digits."""
    return hashlib.blake2b(f"{column}\x1f{value}".encode(), digest_size=8).hexdigest()


def vocabulary(column: str, text: Text, least: int, most: int) -> list[str]:
    """The keys of the values that at least `least` rows hold, of the `most` most frequent ones; ascending."""
    found = [
        (-int(count), key(column, value)) for value, count in zip(text.values, text.counts(), strict=True) if count >= least
    ]
    return sorted(one for _, one in sorted(found)[:most])


def places(column: str, text: Text, keys: list[str]) -> Places:
    """The column's positions among the inputs of a vocabulary."""
    known = {one: place for place, one in enumerate(keys)}
    of_values = np.array([known.get(key(column, value), len(keys)) for value in text.values], dtype=np.int64)
    return Places(text.spread(of_values, len(keys) + 1), len(keys) + 2)


def input_names(column: str, text: Text | None, keys: list[str]) -> list[str]:
    """What the inputs of a column stand for, for a person: `sex=M`, by the values that `text` holds, else by key."""
    spelled = {key(column, value): value for value in text.values} if text else {}
    return [f"{column}={spelled.get(one, '#' + one)}" for one in keys] + [f"{column}: {OTHER}", f"{column}: {MISSING}"]
