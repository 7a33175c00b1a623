"""One linear model for all tasks, exact from sums over nodes: ridge regression, or linear discriminant analysis for classes.

A node sends n, X^T X and X^T Y of its training rows, with a column of ones; the sums determine the model that somebody with all
rows in one place would have. The penalty is the one with the least generalised cross-validation (Golub, Heath, Wahba 1979,
"Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter"), which needs the sums alone. For classes the
targets are one-hot, and the penalty is added to the covariance within classes (Hastie, Tibshirani, Friedman 2009, "The
Elements of Statistical Learning", Equation 4.10, 4.3.1).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PENALTIES = tuple(10.0**power for power in np.arange(-3, 7.5, 0.5))
MOST_FEATURES = 256
"""Most inputs for which sums are sent: they grow with the square."""
LARGEST = 1e30
"""Largest size of a number in a model: with one beyond it the outputs may be infinite."""
NEVER = -LARGEST
"""Logit of a class that no training row has."""


@dataclass(frozen=True)
class Sums:
    """`gram` [d + 1, d + 1]: X^T X with a last column of ones; `cross` [d + 1, outputs]: X^T Y; `squares` [outputs]: of Y."""

    gram: Array
    cross: Array
    squares: Array

    @classmethod
    def of(cls, x: Array, y: Array) -> "Sums":
        """Return the sums of rows x [n, d] and y [n, outputs]."""
        rows = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        return cls(rows.T @ rows, rows.T @ y, np.square(y).sum(axis=0))

    @classmethod
    def joined(cls, parts: "Iterable[Sums]") -> "Sums":
        """Return the sums of all rows of some parts, of which there is at least one."""
        first, *rest = parts
        gram, cross, squares = first.gram.copy(), first.cross.copy(), first.squares.copy()
        for part in rest:
            gram += part.gram
            cross += part.cross
            squares += part.squares
        return cls(gram, cross, squares)


@dataclass(frozen=True)
class GlobalModel:
    """outputs = x W + b: numbers, or logits. `weights` [d, outputs]; `intercept` [outputs]; `shares` [classes]: of the rows."""

    weights: Array
    intercept: Array
    shares: Array

    def outputs(self, x: Array) -> Array:
        """Return the outputs for x [n, d]: [n, outputs]."""
        found: Array = x @ self.weights + self.intercept
        return found


def fit(sums: Sums, *, classes: bool) -> GlobalModel | None:
    """Return the model for numbers, or for one-hot targets if `classes`; None for sums that are none of finite rows."""
    if not _are_of_rows(sums, classes=classes):
        return None
    try:
        found = _fit(sums, classes=classes)
    except np.linalg.LinAlgError:
        return None
    return found if all((np.abs(part) <= LARGEST).all() for part in vars(found).values()) else None


def _are_of_rows(sums: Sums, *, classes: bool) -> bool:
    """Return whether there is a row, no sum is infinite, and classes have numbers of rows that give the number of all."""
    n, counts = sums.gram[-1, -1], sums.cross[-1]
    if not n >= 1 or not all(np.isfinite(part).all() for part in vars(sums).values()):
        return False
    return not classes or bool((counts >= 0).all() and np.isclose(counts.sum(), n))


def _fit(sums: Sums, *, classes: bool) -> GlobalModel:
    n = sums.gram[-1, -1]
    mean, level = sums.gram[-1, :-1] / n, sums.cross[-1] / n
    scatter = sums.gram[:-1, :-1] - n * np.outer(mean, mean)
    cross = sums.cross[:-1] - n * np.outer(mean, level)
    values, vectors = np.linalg.eigh(scatter)
    values = np.maximum(values, 0)
    turned = vectors.T @ cross
    penalty = _best_penalty(values, turned, float((sums.squares - n * level**2).sum()), n)
    if not classes:
        weights = vectors @ (turned / (values + penalty)[:, None])
        return GlobalModel(weights, level - mean @ weights, np.array([]))
    return _discriminant(sums, penalty)


def _best_penalty(values: Array, turned: Array, total: float, n: float) -> float:
    """Return the penalty with the least (residual / n) / (1 - freedom / n)^2. `total`: squares of the centred targets."""
    power = np.square(turned).sum(axis=1)

    def score(penalty: float) -> float:
        shrunk = values + penalty
        residual = max(total - (power * (2 / shrunk - values / shrunk**2)).sum(), 0.0)
        free = 1 - (1 + (values / shrunk).sum()) / n
        return float(residual / n / free**2) if free > 0 else np.inf

    scores = [score(penalty) for penalty in PENALTIES]
    least = min(scores)
    # Of equal ones the largest: it is that of the model with the least to say.
    return max(penalty for penalty, one in zip(PENALTIES, scores, strict=True) if one <= least) if np.isfinite(least) else 1.0


def _discriminant(sums: Sums, penalty: float) -> GlobalModel:
    counts, n = sums.cross[-1], sums.gram[-1, -1]
    present = counts > 0
    means = sums.cross[:-1] / np.maximum(counts, 1)
    within = sums.gram[:-1, :-1] - (means * counts) @ means.T + penalty * np.eye(len(means))
    weights = np.linalg.solve(within / n, means)
    shares = counts / n
    logs = np.log(np.where(present, shares, 1.0))
    intercept = np.where(present, logs - 0.5 * (means * weights).sum(axis=0), NEVER)
    return GlobalModel(weights * present, intercept, shares)
