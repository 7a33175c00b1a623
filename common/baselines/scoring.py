"""A task's scores by the trained model and by the baselines, on the same test rows, each adapted to the same support rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quickbloom.common import scores
from quickbloom.common.baselines import own_ridge
from quickbloom.common.baselines.global_ridge import GlobalModel
from quickbloom.common.baselines.simple import class_shares, nearest, nearest_mean, sure
from quickbloom.common.maths.batch import TaskData
from quickbloom.common.maths.calibration import softmax

Array = NDArray[np.float64]

BASELINES = ("constant", "last", "nearest", "prototypes", "own", "global", "global_offset")
CONTENDERS = ("before", "after", *BASELINES)
"""In the order of the rows of `scores_of_draw`. `before`, `after`: the trained model, without and with adaptation."""

TITLES = {
    "last": "last own value",
    "nearest": "nearest own row",
    "prototypes": "nearest own class mean",
    "own": "ridge, own rows",
    "global": "ridge, all users",
    "global_offset": "... plus own offset",
}
"""What each baseline but the constant is, for a table: what the constant is depends on the data."""
IN_WORDS = {
    "last": "the user's last value",
    "nearest": "the user's nearest row",
    "prototypes": "the nearest mean of the user's own rows of each class",
    "own": "ridge regression on the user's own rows alone",
    "global": "one ridge regression for all users",
    "global_offset": "one ridge regression for all users, with an offset for each",
}
"""The same in a sentence."""


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for a draw's test rows. `before`, `after` [n, outputs]: logits or values; `deviation` [n] or None."""

    before: Array
    after: Array
    deviation: Array | None = None


def scores_of_draw(
    draw: TaskData, model: Outputs, shared: GlobalModel | None, classes: int, unit: float, *, ordered: bool
) -> Array:
    """Return the scores [contenders, scores] of one draw; NaN for a contender that does not apply or is not finite.

    `shared`: the model of `global_ridge`; `classes`: 0 for numbers; `unit`: see `scores.of_numbers`. `ordered`: the support is
    in the order of time.
    """
    kind = "classification" if classes else "regression"
    found = np.full((len(CONTENDERS), len(scores.names(kind))), np.nan)
    y = draw.test.y.cpu().numpy()
    contenders = _with_classes(draw, model, shared, classes) if classes else _with_numbers(draw, model, shared)
    for name, prediction, deviation in contenders:
        if (name == "last" and not ordered) or not np.isfinite(prediction).all():
            continue
        scored = scores.of_classes(y, prediction) if classes else scores.of_numbers(_flat(y), prediction, deviation, unit)
        found[CONTENDERS.index(name)] = list(scored.values())
    return found


def _with_classes(
    draw: TaskData, model: Outputs, shared: GlobalModel | None, classes: int
) -> Iterator[tuple[str, Array, None]]:
    """Yield (name, probabilities [n, classes], None)."""
    labels, n = draw.support.y.cpu().numpy(), len(draw.test.y)
    yield "before", softmax(model.before), None
    yield "after", softmax(model.after), None
    shares = class_shares(labels, classes)
    yield "constant", np.tile(shares, (n, 1)), None
    yield "last", sure(np.repeat(labels[-1:], n), classes, len(labels)), None
    if draw.support.x.is_floating_point():
        support, x = rows_of(draw.support.x), rows_of(draw.test.x)
        yield "nearest", sure(labels[nearest(support, x)], classes, len(labels)), None
        yield "prototypes", sure(nearest_mean(support, labels, x), classes, len(labels)), None
        yield "own", softmax(own_ridge.fit_classes(support, labels, classes).outputs(x)), None
        if shared is not None:
            logits = shared.outputs(x)
            yield "global", softmax(logits), None
            yield "global_offset", softmax(logits + _shift(labels, shared.shares)), None


def _with_numbers(draw: TaskData, model: Outputs, shared: GlobalModel | None) -> Iterator[tuple[str, Array, Array | None]]:
    """Yield (name, values [n], deviations [n] or None)."""
    numbers, n = _flat(draw.support.y.cpu().numpy()), len(draw.test.y)
    yield "before", _flat(model.before), None
    yield "after", _flat(model.after), model.deviation
    yield "constant", np.full(n, numbers.mean()), None
    yield "last", np.full(n, numbers[-1]), None
    if draw.support.x.is_floating_point():
        support, x = rows_of(draw.support.x), rows_of(draw.test.x)
        yield "nearest", numbers[nearest(support, x)], None
        yield "own", _flat(own_ridge.fit_numbers(support, numbers).outputs(x)), None
        if shared is not None:
            values = _flat(shared.outputs(x))
            yield "global", values, None
            yield "global_offset", values + (numbers - _flat(shared.outputs(support))).mean(), None


def rows_of(x: Tensor) -> Array:
    """Return inputs [n, ...] as rows [n, d] of float64."""
    found: Array = x.cpu().reshape(len(x), -1).double().numpy()
    return found


def _shift(labels: NDArray[np.int64], shares: Array) -> Array:
    """Return what to add to the logits of a model for all [classes], so that it expects classes as often as this task has them.

    The task's shares are drawn to those of all by as many rows as there are classes.
    """
    classes = len(shares)
    own = (np.bincount(labels, minlength=classes) + classes * shares) / (len(labels) + classes)
    known = shares > 0
    return np.where(known, np.log(np.where(own > 0, own, 1.0)) - np.log(np.where(known, shares, 1.0)), 0.0)


def _flat(values: NDArray[np.floating]) -> Array:
    """Return the first output of every row [n] as float64."""
    found: Array = np.asarray(values, dtype=np.float64).reshape(len(values), -1)[:, 0]
    return found
