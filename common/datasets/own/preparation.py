"""How a task's rows become inputs: measured on its support part, kept with its personal model, used again on new rows."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from quickbloom.common.datasets.own.columns import Inputs
from quickbloom.common.datasets.own.image_arrays import inputs_of
from quickbloom.common.datasets.own.tables import PIXELS
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.datasets.own.vocabulary import Places

_MOST = 10.0
"""Standardised inputs are clipped here: a column that hardly varies in a small support would blow up elsewhere."""
_ENDLESS = 1e300
"""A deviation that makes a 0 of every number."""
_LEAST = 1e-9
"""Of the largest number of a support part: a deviation below it is what rounding leaves of none."""


@dataclass(frozen=True)
class Scale:
    """Mean and deviation of the known numbers of a support part; without spread the deviation is what `of` is told."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, column: Array, without_spread: float = 1.0) -> "Scale":
        known = column[~np.isnan(column)]
        if not len(known):
            return cls(0.0, without_spread)
        return cls(float(known.mean()), float(known.std()) if has_spread(known) else without_spread)

    def apply(self, column: Array) -> Array:
        """The column in deviations from the mean; missing stays missing."""
        return (column - self.mean) / self.deviation

    def undo(self, column: Array) -> Array:
        """Numbers in the unit that they were measured in."""
        return column * self.deviation + self.mean


def has_spread(numbers: Array) -> bool:
    """Whether they differ by more than rounding does."""
    return bool(numbers.std() > _LEAST * np.abs(numbers).max())


def _scale(column: Array) -> Scale:
    """Where the support part holds no number, nothing says how large those of other rows are: they become 0 as well."""
    return Scale(0.0, _ENDLESS) if np.isnan(column).all() else Scale.of(column)


@dataclass(frozen=True)
class Preparation:
    """`features`: the columns of the inputs in their order; `numbers`: the scale of every one that holds numbers.

    `brightest`: what decimal pixels are divided by; whole numbers have a type that says it. `target`: the scale of a regression
    target; None for classes.
    """

    features: tuple[str, ...]
    numbers: Mapping[str, Scale] = field(default_factory=dict)
    brightest: float = 1.0
    target: Scale | None = None

    @property
    def images(self) -> bool:
        return self.features == (PIXELS,)

    def encode(self, inputs: Inputs) -> Array:
        """float32 inputs [rows, ...] of the columns `features`; a missing number becomes the support's mean, which is 0."""
        if self.images:
            return inputs_of(self._numbers(inputs, PIXELS), self.brightest)
        blocks = [self._block(inputs, name) for name in self.features]
        return np.concatenate(blocks, axis=1).astype(np.float32)

    def _block(self, inputs: Inputs, name: str) -> Array:
        column = inputs[name]
        if isinstance(column, Places):
            return column.one_hot()
        scaled: Array = np.clip(self.numbers[name].apply(column), -_MOST, _MOST)
        return np.nan_to_num(scaled)[:, None]

    def _numbers(self, inputs: Inputs, name: str) -> Array:
        column = inputs[name]
        assert isinstance(column, np.ndarray)
        return column

    def to_json(self) -> dict[str, Any]:
        """As plain lists, dictionaries and numbers; `from_json` is the inverse, to the last bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Preparation":
        if not facts:  # of a data set whose examples are inputs already
            return cls(())
        numbers = {name: Scale(**scale) for name, scale in facts["numbers"].items()}
        target = Scale(**facts["target"]) if facts["target"] else None
        return cls(tuple(facts["features"]), numbers, facts["brightest"], target)


def measure(inputs: Inputs, target: Array | None, target_deviation: float = 1.0, brightest: float = 1.0) -> Preparation:
    """The preparation of one task by the columns of its support part. `target`: if it is regression."""
    numbers = {name: _scale(column) for name, column in inputs.items() if name != PIXELS and isinstance(column, np.ndarray)}
    scale = Scale.of(target, target_deviation) if target is not None else None
    return Preparation(tuple(inputs), numbers, brightest, scale)
