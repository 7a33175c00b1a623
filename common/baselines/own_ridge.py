"""Ridge regression on a task's own rows alone: what somebody can have without a federation.

    W, b = argmin ||Y - X W - b||^2 + penalty ||W||^2

The penalty is the one with the least leave-one-out error. That needs no refits: with the centred X = U S V^T, the row i
that is left out has the error e_i / (1 - h_i), where e = Y - mean(Y) - U S^2 / (S^2 + penalty) U^T Y and h_i is the i-th
diagonal element of 1/n + U S^2 / (S^2 + penalty) U^T (Allen 1974, "The Relationship between Variable Selection and Data
Augmentation and a Method for Prediction"). The intercept has no penalty. Classes are regressed as one-hot targets, and
the softmax is of outputs times a scale.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quickbloom.common.maths.calibration import softmax_scale

Array = NDArray[np.float64]
PENALTIES = tuple(10 ** (step / 2) for step in range(-12, 17))
"""Penalties that are tried, for inputs of about deviation 1: from 1e-6, where columns nearly repeat each other, to 1e8, where
the constant is left."""
_TIES = 1e-9
"""Share of the least error within which a larger penalty is taken."""
_ROUNDING = 1e-12


@dataclass(frozen=True)
class OwnRidge:
    """A linear model of a task. `coefficients` [d, outputs]; `intercept` [outputs]; `penalty`: the chosen one.

    `scale`: factor on the outputs before the softmax (1 for numbers). `left_out` [n, outputs]: the output for every row of
    a model of all other rows, with the chosen penalty; NaN if there is one row alone.
    """

    coefficients: Array
    intercept: Array
    penalty: float
    scale: float
    left_out: Array

    def outputs(self, features: ArrayLike) -> Array:
        """Return the values for features [n, d], or the logits of the classes: [n, outputs]."""
        return self.scale * (np.asarray(features, dtype=np.float64) @ self.coefficients + self.intercept)

    @property
    def left_out_outputs(self) -> Array:
        """As `outputs`, for the rows that the model learned from, each by a model without it: [n, outputs]."""
        return self.scale * self.left_out


def fit_numbers(features: ArrayLike, y: ArrayLike, penalties: ArrayLike = PENALTIES) -> OwnRidge:
    """Return the model for numbers y [n] or [n, outputs] by `features` [n, d], n at least 1; `penalties` above 0.

    Equal leave-one-out errors go to the largest penalty. From one row no penalty can be chosen: the model is its target.
    """
    targets = np.asarray(y, dtype=np.float64)
    return _fit(features, targets[:, None] if targets.ndim == 1 else targets, penalties)


def fit_classes(features: ArrayLike, labels: ArrayLike, classes: int, penalties: ArrayLike = PENALTIES) -> OwnRidge:
    """Return the model for `labels` [n] in 0..classes-1: regression on one-hot targets.

    `scale` has the least log loss on the left-out rows, see `softmax_scale`; a class without a row has the output 0.
    """
    positions = np.asarray(labels, dtype=np.int64)
    found = _fit(features, np.eye(classes)[positions], penalties)
    scale = softmax_scale(found.left_out, positions) if len(positions) > 1 else 1.0
    return OwnRidge(found.coefficients, found.intercept, found.penalty, scale, found.left_out)


def _fit(features: ArrayLike, targets: Array, penalties: ArrayLike) -> OwnRidge:
    x = np.asarray(features, dtype=np.float64)
    tried = np.sort(np.asarray(penalties, dtype=np.float64))
    middle, mean = x.mean(axis=0), targets.mean(axis=0)
    u, s, vt = _decomposed(x - middle)
    seen = u.T @ (targets - mean)
    left_out = _LeftOut(u, s, seen, targets)
    chosen = _best(np.array([np.square(left_out.predicted(penalty) - targets).mean() for penalty in tried]))
    coefficients = vt.T @ ((s / (s**2 + tried[chosen]))[:, None] * seen)
    return OwnRidge(coefficients, mean - middle @ coefficients, float(tried[chosen]), 1.0, left_out.predicted(tried[chosen]))


def _decomposed(centred: Array) -> tuple[Array, Array, Array]:
    """Return U, S and V^T without the directions in which the rows do not differ: one of those is the intercept's."""
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    kept = s > s.max(initial=0.0) * max(centred.shape) * np.finfo(np.float64).eps
    return u[:, kept], s[kept], vt[kept]


class _LeftOut:
    """Predictions for every row by a model of the others. `seen`: U^T (Y - mean) [directions, outputs]."""

    def __init__(self, u: Array, s: Array, seen: Array, targets: Array) -> None:
        self._u, self._s, self._seen, self._targets = u, s, seen, targets
        self._squares = np.square(u)
        self._outside = targets - targets.mean(axis=0) - u @ seen  # the part of Y that no coefficient can reach
        # 1 - h_i as a sum of parts that are not negative: 1 - (a number near 1) would lose all digits for small penalties.
        reach = np.maximum(1 - 1 / len(targets) - self._squares.sum(axis=1), 0)
        self._reach = np.where(reach < _ROUNDING, 0, reach)

    def predicted(self, penalty: float) -> Array:
        """Return the predictions [n, outputs]; NaN for one row alone."""
        if len(self._targets) < 2:
            return np.full_like(self._targets, np.nan)
        lost = penalty / (self._s**2 + penalty)  # what the penalty takes from each direction
        kept = self._reach + self._squares @ lost
        errors = self._outside + self._u @ (lost[:, None] * self._seen)
        result: Array = self._targets - errors / kept[:, None]
        return result


def _best(errors: Array) -> int:
    """Return the position of the least error; of equal ones the last. All are NaN for one row: the last."""
    if np.isnan(errors).all():
        return len(errors) - 1
    least = np.nanmin(errors)
    return int(np.flatnonzero(errors <= least * (1 + _TIES) + np.finfo(np.float64).tiny)[-1])
