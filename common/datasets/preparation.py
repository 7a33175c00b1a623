"""How a task's rows become inputs: measured on its support part, kept with its personal model, used again on new rows."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from common.datasets.tables import PIXELS, Array, Table

_MOST = 10.0
"""Standardised numbers are clipped here: a column that hardly varies in a small support would blow up elsewhere."""


@dataclass(frozen=True)
class Scale:
    """Mean and deviation of the known numbers of a support part; a deviation of 0 is taken for 1."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, column: Array) -> "Scale":
        known = column[~np.isnan(column)]
        deviation = float(known.std()) if len(known) else 0.0
        return cls(float(known.mean()) if len(known) else 0.0, deviation if deviation > 1e-12 else 1.0)

    def apply(self, column: Array) -> Array:
        """The column in deviations from the mean, clipped; missing stays missing."""
        return np.clip((column - self.mean) / self.deviation, -_MOST, _MOST)

    def undo(self, column: Array) -> Array:
        """Numbers in the unit that they were measured in."""
        return column * self.deviation + self.mean


@dataclass(frozen=True)
class Preparation:
    """`numbers`: the scale of every column of numbers; a column of `features` without one is text, or holds the pixels.

    `brightest`: what pixels are divided by. `target`: the scale of a regression target; None for classes.
    """

    features: tuple[str, ...]
    numbers: Mapping[str, Scale] = field(default_factory=dict)
    category_width: int = 8
    brightest: float = 1.0
    target: Scale | None = None

    @property
    def images(self) -> bool:
        return self.features == (PIXELS,)

    def encode(self, table: Table) -> Array:
        """float32 inputs [rows, ...] of the columns `features`; a missing number becomes the support's mean, which is 0."""
        if self.images:
            return (table[PIXELS] / self.brightest).astype(np.float32)
        blocks = [
            np.nan_to_num(self.numbers[name].apply(table[name]))[:, None]
            if name in self.numbers
            else hashed(name, table[name], self.category_width)
            for name in self.features
        ]
        return np.concatenate(blocks, axis=1).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """As plain lists, dictionaries and numbers; `from_json` is the inverse, to the last bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Preparation":
        if not facts:  # of a data set whose examples are inputs already
            return cls(())
        numbers = {name: Scale(**scale) for name, scale in facts["numbers"].items()}
        target = Scale(**facts["target"]) if facts["target"] else None
        return cls(tuple(facts["features"]), numbers, facts["category_width"], facts["brightest"], target)


def measure(table: Table, features: Sequence[str], support: Array, category_width: int, target: Array | None) -> Preparation:
    """The preparation of one task. `table`: its columns; `support`: positions of its support rows; `target`: if regression."""
    numbers = {name: Scale.of(table[name][support]) for name in features if name != PIXELS and table[name].dtype != object}
    scale = Scale.of(target[support]) if target is not None else None
    return Preparation(tuple(features), numbers, category_width, 1.0, scale)


def hashed(name: str, column: Array, width: int) -> Array:
    """One-hot [rows, width] of a text column by the hash of its values: the same on every node; missing is all zeros."""
    result = np.zeros((len(column), width))
    for row, value in enumerate(column):
        if value is not None:
            digest = hashlib.blake2b(f"{name}\x1f{value}".encode(), digest_size=8).digest()
            result[row, int.from_bytes(digest, "big") % width] = 1.0
    return result
