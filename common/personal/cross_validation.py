"""What adapting is worth on a device's own rows, by cross-validation, when all of them are adapted to.

Each row is scored once, by a model that adapted to the rows of the other folds and to nothing else; columns and
target are standardised by those rows as well. Rows in order of time (`own.time-column`) are scored forward: folds
are contiguous, each is scored by a model of all rows before it, and the first rows are only adapted to.

The shared model is scored beside it, and the constant that needs no model: the most frequent class, or the mean
target, of those rows.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.datasets.own import Own
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.datasets.row_order import folds as deal
from quickbloom.common.datasets.time_order import folds as forward
from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.params import Params

FOLDS = 5
"""Folds unless the user says otherwise."""


@dataclass(frozen=True)
class Scores:
    """Accuracy, or mse in variances of the target of all rows; infinite or NaN where a model diverged.

    `before`: the shared model; `after`: the adapted one; `constant`: the most frequent class or the mean
    target. `rows`: rows that were scored.
    """

    before: float
    after: float
    constant: float
    rows: int
    folds: int


def cross_validate(
    algorithm: Algorithm, meta: Params, kept: Params, own: Own, task_id: str, lr: float, steps: int, folds: int
) -> Scores | None:
    """Return what `steps` of adaptation with the rate `lr` are worth on a task, or None for fewer than two folds.

    `own`: read with `whole`. `folds`: at most; each has at least two rows, so six rows give three, and in order of
    time two.
    """
    rows = own.rows[task_id][0]
    fold, number = _folds(own, rows, folds)
    if not number:
        return None
    total = np.zeros(3)
    for one in range(number):
        others = fold != one if own.moments is None else fold < one
        total += _of_fold(algorithm, meta, kept, own, (rows[others], rows[fold == one]), lr, steps)
    scored = int((fold >= 0).sum())
    before, after, constant = total / scored / own.target_deviation(task_id) ** 2
    return Scores(float(before), float(after), float(constant), scored, number)


def _folds(own: Own, rows: Array, most: int) -> tuple[Array, int]:
    """Return the fold of every row, -1: never held out, and the number of folds; 0: too few rows."""
    if own.moments is not None:
        return forward(own.moments[rows], most)
    y = own.target.values[rows]
    return deal(own.content[rows], y if own.kind == "classification" else np.zeros(len(y)), most)


def _of_fold(
    algorithm: Algorithm, meta: Params, kept: Params, own: Own, parts: tuple[Array, Array], lr: float, steps: int
) -> Array:
    """Return sums [3] over the second part, before, after and constant: of hits, or of squared errors in the target's unit."""
    preparation = own.preparation_by(parts[0])
    support, test = (own.batch(preparation, rows) for rows in parts)
    unit = preparation.target.deviation if preparation.target else 1.0
    first, last = ends_of_path(algorithm, meta, kept, support, lr, steps)
    test_there = on_device(test, algorithm)
    with torch.no_grad():
        scores = [float(algorithm.score(phi, test_there)[1]) for phi in (first, last)]
    sums = len(test.x) * np.array([*scores, _constant(support.y, test.y)])
    return sums * unit**2 if preparation.target else np.round(sums)  # whole numbers of hits, which float32 blurs


def _constant(support: Tensor, test: Tensor) -> float:
    if support.dtype == torch.int64:
        return float((test == support.bincount().argmax()).double().mean())
    return float((test.double() - support.double().mean()).square().mean())


def ends_of_path(
    algorithm: Algorithm, meta: Params, kept: Params, support: Batch, lr: float, steps: int
) -> tuple[Params, Params]:
    """Return the parameters before the first and after the last step of adaptation."""
    with torch.no_grad():
        path = iter(algorithm.personal_path(meta, kept, on_device(support, algorithm), lr, steps))
        first = next(path)
        return first, [first, *deque(path, maxlen=1)][-1]


def on_device(batch: Batch, algorithm: Algorithm) -> Batch:
    """Return the batch where the algorithm computes."""
    return Batch(*(value.to(algorithm.learner.device) for value in batch))


def known(score: float) -> float | None:
    """Return a score as in JSON, which has no infinity and no NaN."""
    return score if math.isfinite(score) else None
