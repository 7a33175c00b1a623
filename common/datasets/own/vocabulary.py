"""Categories of a text column, and the inputs that stand for them.

All nodes agree on a vocabulary, but its values may be private. It therefore holds keys, hashes of
64 bits: a node that has a value finds its place, and anybody else who has the vocabulary must
guess. Among 10,000 values two share a key with probability 3e-12. A column becomes one input per
key in its order, one for any other value, and one for a missing value.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from quickbloom.common.datasets.own.text import Array, Text

OTHER, MISSING = "other", "missing"


@dataclass(frozen=True)
class Places:
    """A text column as positions among its inputs: `at`, int64 [rows], in 0..size-1."""

    at: Array
    size: int

    def __len__(self) -> int:
        return len(self.at)

    def take(self, rows: Array) -> "Places":
        """Return the column restricted to `rows`."""
        return Places(self.at[rows], self.size)

    def one_hot(self) -> Array:
        """Return float32 [rows, size]."""
        result: Array = (self.at[:, None] == np.arange(self.size)).astype(np.float32)
        return result


def key(column: str, value: str) -> str:
    """Return the key of a value of the column: 16 hexadecimal digits."""
    return hashlib.blake2b(f"{column}\x1f{value}".encode(), digest_size=8).hexdigest()


def vocabulary(column: str, text: Text, least: int, most: int) -> list[str]:
    """Return the keys of the `most` most frequent values that at least `least` rows hold; ascending."""
    found = [
        (-int(count), key(column, value)) for value, count in zip(text.values, text.counts(), strict=True) if count >= least
    ]
    return sorted(one for _, one in sorted(found)[:most])


def places(column: str, text: Text, keys: list[str]) -> Places:
    """Return the column's positions among the inputs of a vocabulary."""
    known = {one: place for place, one in enumerate(keys)}
    of_values = np.array([known.get(key(column, value), len(keys)) for value in text.values], dtype=np.int64)
    return Places(text.spread(of_values, len(keys) + 1), len(keys) + 2)


def input_names(column: str, text: Text | None, keys: list[str]) -> list[str]:
    """Return readable names of a column's inputs: `sex=M` for values in `text`, else the key."""
    spelled = {key(column, value): value for value in text.values} if text else {}
    return [f"{column}={spelled.get(one, '#' + one)}" for one in keys] + [f"{column}: {OTHER}", f"{column}: {MISSING}"]
