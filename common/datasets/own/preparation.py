"""Preparation of a task's rows as inputs: measured on its support part, stored with its personal model, applied to new rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from quickbloom.common.datasets.own.columns import Inputs
from quickbloom.common.datasets.own.encoded import Encoded, Tokens, mean_of
from quickbloom.common.datasets.own.files.image_arrays import inputs_of
from quickbloom.common.datasets.own.files.tables import PIXELS
from quickbloom.common.datasets.own.scales import LEAST_SPREAD
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.datasets.own.vocabulary import Places

_MOST = 10.0
"""Bound on standardised inputs: a column that hardly varies in a small support would have huge values elsewhere."""
_ENDLESS = 1e300
"""A deviation so large that every number becomes 0."""


@dataclass(frozen=True)
class Scale:
    """Mean and deviation of the known numbers of a support part; without spread the deviation is a given value."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, column: Array, without_spread: float = 1.0) -> "Scale":
        known = column[~np.isnan(column)]
        if not len(known):
            return cls(0.0, without_spread)
        return cls(float(known.mean()), float(known.std()) if has_spread(known) else without_spread)

    def apply(self, column: Array) -> Array:
        """Return the column in deviations from the mean; missing stays missing."""
        return (column - self.mean) / self.deviation

    def undo(self, column: Array) -> Array:
        """Return numbers in their original unit: the inverse of `apply`."""
        return column * self.deviation + self.mean


def has_spread(numbers: Array) -> bool:
    """Return whether the numbers differ by more than rounding."""
    return bool(numbers.std() > LEAST_SPREAD * np.abs(numbers).max())


def _scale(column: Array) -> Scale:
    """Return the scale of a support part. Without any number its scale is unknown, so other rows become 0 as well."""
    return Scale(0.0, _ENDLESS) if np.isnan(column).all() else Scale.of(column)


@dataclass(frozen=True)
class Preparation:
    """Preparation of one task's inputs.

    `features`: input columns in order; `numbers`: scales of the numeric ones. `brightest`: divisor
    of decimal pixels (the type of integers determines it). `target`: scale of a regression target;
    None for classes. `encoded`: of every column of features the mean by which they are moved; [] for none.
    """

    features: tuple[str, ...]
    numbers: Mapping[str, Scale] = field(default_factory=dict)
    brightest: float = 1.0
    target: Scale | None = None
    encoded: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def images(self) -> bool:
        return self.features == (PIXELS,) and not self.encoded

    def encode(self, inputs: Inputs) -> Array:
        """Return float32 inputs [rows, ...] of the columns `features`, or int64 token ids [rows, length].

        A missing number becomes the support's mean, which is 0.
        """
        if self.images:
            return inputs_of(self._numbers(inputs, PIXELS), self.brightest)
        if isinstance(only := inputs[self.features[0]], Tokens):
            return only.inputs()
        blocks = [self._block(inputs, name) for name in self.features]
        return np.concatenate(blocks, axis=1).astype(np.float32)

    def _block(self, inputs: Inputs, name: str) -> Array:
        column = inputs[name]
        if isinstance(column, Places):
            return column.one_hot()
        assert not isinstance(column, Tokens)
        if isinstance(column, Encoded):
            return column.inputs(self.encoded[name])
        scaled: Array = np.clip(self.numbers[name].apply(column), -_MOST, _MOST)
        return np.nan_to_num(scaled)[:, None]

    def _numbers(self, inputs: Inputs, name: str) -> Array:
        column = inputs[name]
        assert isinstance(column, np.ndarray)
        return column

    def on_shared(self, numbers: Mapping[str, Sequence[float]], target: Sequence[float]) -> "Preparation":
        """Return this preparation with the given (mean, deviation) of columns and of the target in place of its own."""
        mine = {name: Scale(*numbers[name]) if name in numbers else scale for name, scale in self.numbers.items()}
        means = {name: mean_of(name, numbers) for name in self.encoded}
        return replace(self, numbers=mine, target=Scale(*target) if target and self.target else self.target, encoded=means)

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, dictionaries and numbers; `from_json` is the exact inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Preparation":
        if not facts:  # the data set's examples are inputs already
            return cls(())
        numbers = {name: Scale(**scale) for name, scale in facts["numbers"].items()}
        target = Scale(**facts["target"]) if facts["target"] else None
        means = {str(name): [float(one) for one in mean] for name, mean in facts.get("encoded", {}).items()}
        return cls(tuple(facts["features"]), numbers, facts["brightest"], target, means)


def measure(inputs: Inputs, target: Array | None, target_deviation: float = 1.0, brightest: float = 1.0) -> Preparation:
    """Return the preparation of one task from the columns of its support part. `target`: for regression only."""
    numbers = {name: _scale(column) for name, column in inputs.items() if name != PIXELS and isinstance(column, np.ndarray)}
    scale = Scale.of(target, target_deviation) if target is not None else None
    means: dict[str, list[float]] = {name: [] for name, column in inputs.items() if isinstance(column, Encoded)}
    return Preparation(tuple(inputs), numbers, brightest, scale, means)
