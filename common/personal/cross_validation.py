"""What adapting is worth on a device's own rows, by cross-validation, when all of them are adapted to.

Each row is scored once, by a model that adapted to the rows of the other folds and to nothing else; columns and
target are standardised by those rows as well. Beside it are scored, on the same rows: the shared model; the constant
that needs no model, the most frequent class or the mean target of those rows; and ridge regression on those rows
alone (`common.baselines.own_ridge`), which needs no federation. Rows in order of time (`own.time-column`) are scored
forward: folds are contiguous, each is scored by a model of all rows before it, and the first rows are only adapted to.
"""

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.baselines.own_ridge import OwnRidge, fit_classes, fit_numbers
from quickbloom.common.baselines.scoring import rows_of
from quickbloom.common.baselines.simple import class_shares
from quickbloom.common.datasets.own import Own
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.datasets.row_order import folds as deal
from quickbloom.common.datasets.time_order import folds as forward
from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.calibration import UNREACHABLE, log_loss, softmax, softmax_scale
from quickbloom.common.maths.intervals import half_width, wilson
from quickbloom.common.maths.learner import hits
from quickbloom.common.maths.params import Params
from quickbloom.common.metric import Metric

FOLDS = 5
"""Folds unless the user says otherwise."""
CONSTANT, OWN, BEFORE, AFTER = "constant", "own", "before", "after"
SCORED = (CONSTANT, OWN, BEFORE, AFTER)
"""What is scored, the simplest first: the constant, ridge on the own rows, the shared model, the adapted one."""
LEAST_ROWS = 20
"""Scored rows from which a temperature is computed: fewer say too little of how often a model is wrong."""
_LEAST_GAIN = 1.0
_MOST_WORK = 5 * 10**9
"""Rows times inputs times the smaller of the two, beyond which a fold goes without ridge: about ten seconds."""


@dataclass(frozen=True)
class Scores:
    """Scores of each of `SCORED` on the rows that were held out once.

    `each`: by name, float64 [rows]: 1 for a right class and 0 for a wrong one, or the squared error in variances of the target
    of all rows; infinite or NaN where a model diverged, and for ridge on very large data. For classes `outputs` are by name
    the logits, float64 [rows, classes], and `labels` [rows] what they should have said.
    """

    each: dict[str, Array]
    labels: Array
    folds: int
    outputs: dict[str, Array] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows that were scored."""
        return len(self.labels)

    def value(self, name: str) -> float:
        """Return the accuracy, or the mse in variances of the target of all rows."""
        return float(self.each[name].mean())

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return the ends of the 95 % interval of `value`, or None if it is not finite, or an error of one row alone.

        Over rows: Wilson's for an accuracy; Student's t of the squared errors, from 0 up. As if rows were independent: the
        models of two folds share most of their rows, which no formula accounts for (Bengio and Grandvalet 2004, "No
        Unbiased Estimator of the Variance of K-Fold Cross-Validation").
        """
        each = self.each[name]
        if not np.isfinite(each).all():
            return None
        if self.outputs:
            return wilson(self.value(name), self.rows)
        half = float(half_width(each))
        return (max(0.0, self.value(name) - half), self.value(name) + half) if math.isfinite(half) else None

    def best(self, metric: Metric) -> str:
        """Return which of `SCORED` is the best; of those that are equal as they are told the simplest."""
        return min(SCORED, key=lambda name: metric.cost(as_told(self.value(name))))

    def kept(self, metric: Metric, model: str) -> str:
        """Return what is to be the personal model: `model`, "before" or "after", or the better of ridge and the constant.

        Of these two the constant, if they are equal as they are told. It has to be better than the model by more than one
        standard error of the mean difference over rows: with ten rows the least of several errors is often so by chance, and
        the model of the run has seen more than these rows (the rule of Breiman, Friedman, Olshen, Stone 1984,
        "Classification and Regression Trees", section 3.4.3). For classes its log loss must be better, too: where most rows are
        of one class, a constant is right more often than a model that tells more.
        """
        simple = min((CONSTANT, OWN), key=lambda name: metric.cost(as_told(self.value(name))))
        if not math.isfinite(self.value(simple)) or (self.outputs and self.log_loss(simple) >= self.log_loss(model)):
            return model
        with np.errstate(invalid="ignore"):
            gains = (self.each[simple] - self.each[model]) * (1 if metric.higher_is_better else -1)
        error = float(gains.std(ddof=1)) / math.sqrt(self.rows) if np.isfinite(gains).all() else 0.0
        return simple if not math.isfinite(self.value(model)) or gains.mean() > error else model

    def log_loss(self, name: str) -> float:
        """Return the mean log loss of classes, of "before" and "after" at their `temperature`; infinity if one diverged."""
        temperature = self.temperature(name) if name in (BEFORE, AFTER) else None
        shares = softmax(self.outputs[name] / (temperature or 1.0))[np.arange(self.rows), self.labels.astype(np.int64)]
        return float(-np.log(shares).mean()) if (shares > 0).all() else math.inf

    def temperature(self, name: str) -> float | None:
        """Return what the outputs of "before" or "after" are divided by before the softmax for the least log loss.

        Computed on outputs for rows that the model at hand did not adapt to, see `softmax_scale`. None for numbers, for
        fewer than `LEAST_ROWS` such rows of classes that the model can predict, and if the log loss of all of them together
        falls by less than one nat: what one more parameter gains by chance (Akaike 1974, "A New Look at the Statistical
        Model Identification").
        """
        if not self.outputs:
            return None
        outputs, labels = self.outputs[name], self.labels.astype(np.int64)
        useful = np.isfinite(outputs).all(axis=1) & (outputs[np.arange(self.rows), labels] > UNREACHABLE)
        if useful.sum() < LEAST_ROWS:
            return None
        outputs, labels = outputs[useful], labels[useful]
        scale = softmax_scale(outputs, labels)
        gain = log_loss(outputs, labels, 1.0) - log_loss(outputs, labels, scale)
        return 1 / scale if gain > _LEAST_GAIN else None


def cross_validate(
    algorithm: Algorithm, meta: Params, own: Own, task_id: str, lr: float, steps: int, folds: int
) -> Scores | None:
    """Return what `steps` of adaptation with the rate `lr` are worth on a task, or None for fewer than two folds.

    `own`: read with `whole`. `folds`: at most; each has at least two rows, so six rows give three, and in order of
    time two.
    """
    rows = own.rows[task_id][0]
    y = own.target.values[rows]
    classes = own.kind == "classification"
    fold, number = _folds(own, rows, folds)
    if not number:
        return None
    each = {name: np.full(len(rows), np.nan) for name in SCORED}
    outputs = {name: np.full((len(rows), len(own.classes)), np.nan) for name in SCORED if classes}
    for one in range(number):
        held = np.flatnonzero(fold == one)
        learned = rows[fold != one if own.times is None else fold < one]
        preparation = own.preparation_by(learned)
        support, test = own.batch(preparation, learned), own.batch(preparation, rows[held])
        unit = preparation.target.deviation if preparation.target else 1.0
        for name, found in _predictions(algorithm, meta, support, test.x, lr, steps, len(own.classes)).items():
            each[name][held] = _right(found, test.y) if classes else _squares(found, test.y) * unit**2
            if name in outputs:
                outputs[name][held] = found
    scored = fold >= 0
    variance = own.target_deviation(task_id) ** 2
    return Scores(
        {name: values[scored] / variance for name, values in each.items()},
        y[scored],
        number,
        {name: values[scored] for name, values in outputs.items()},
    )


def _folds(own: Own, rows: Array, most: int) -> tuple[Array, int]:
    """Return the fold of every row, -1: never held out, and the number of folds; 0: too few rows."""
    if own.times is not None:
        return forward(own.times[rows], most)
    y = own.target.values[rows]
    return deal(own.content[rows], y if own.kind == "classification" else np.zeros(len(y)), most)


def _predictions(
    algorithm: Algorithm, meta: Params, support: Batch, x: Tensor, lr: float, steps: int, classes: int
) -> dict[str, Array]:
    """Return the outputs of all of `SCORED` that can be had for the rows `x`, by what `support` shows: float64 [n, outputs]."""
    first, last = ends_of_path(algorithm, meta, None, support, lr, steps)
    there = x.to(algorithm.learner.device)
    with torch.no_grad():
        before, after = (algorithm.predict(phi, there).cpu().double().numpy() for phi in (first, last))
    found = {BEFORE: before, AFTER: after, CONSTANT: np.tile(constant(support.y, classes), (len(x), 1))}
    if ridge := own_ridge(support, classes):
        found[OWN] = ridge.outputs(rows_of(x))
    return found


def own_ridge(support: Batch, classes: int) -> OwnRidge | None:
    """Return ridge regression on these rows alone, or None where that would take long, and for tokens.

    `classes`: 0 for numbers.
    """
    if not support.x.is_floating_point():
        return None
    size = support.x[0].numel(), len(support.x)
    return None if math.prod(size) * min(size) > _MOST_WORK else fitted(support, classes)


def fitted(support: Batch, classes: int) -> OwnRidge:
    """Return ridge regression on these rows alone, however long that takes. `classes`: 0 for numbers."""
    x = rows_of(support.x)
    return fit_classes(x, support.y, classes) if classes else fit_numbers(x, support.y)


def constant(y: Tensor, classes: int) -> Array:
    """Return the outputs [outputs] of the constant: the mean, or logits that are largest for the most frequent class."""
    return np.log(class_shares(y.numpy(), classes)) if classes else y.double().mean(dim=0).numpy()


def _right(outputs: Array, y: Tensor) -> Array:
    return hits(torch.from_numpy(outputs), y).numpy()


def _squares(outputs: Array, y: Tensor) -> Array:
    with np.errstate(over="ignore"):  # a model that diverged
        result: Array = np.square(outputs - y.double().numpy()).mean(axis=1)
    return result


def ends_of_path(
    algorithm: Algorithm, meta: Params, kept: Params | None, support: Batch, lr: float, steps: int
) -> tuple[Params, Params]:
    """Return the parameters before the first and after the last step of adaptation, `settled`.

    `kept`: the task's state, if it has any.
    """
    there = on_device(support, algorithm)
    with torch.no_grad():
        if kept is None:
            path = iter(algorithm.adaptation_path(meta, there, lr, steps))
        else:
            path = iter(algorithm.personal_path(meta, kept, there, lr, steps))
        path = algorithm.settled_path(path, there)
        first = next(path)
        return first, [first, *deque(path, maxlen=1)][-1]


def on_device(batch: Batch, algorithm: Algorithm) -> Batch:
    """Return the batch where the algorithm computes."""
    return Batch(*(value.to(algorithm.learner.device) for value in batch))


def as_told(score: float) -> float:
    """Return a score to four digits: what is told, and decides which of two is better."""
    return float(f"{score:.4g}")


def known(score: float) -> float | None:
    """Return a score as in JSON, which has no infinity and no NaN."""
    return score if math.isfinite(score) else None
