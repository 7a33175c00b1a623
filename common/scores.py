"""Scores that decisions need, of a task's predictions: for classes from probabilities, for numbers in the target's unit.

Written out, because a node scores thousands of small predictions and a library's checks cost a hundred times as much; each
equals scikit-learn's function of the same name to rounding, where there is one. NaN: the rows cannot tell.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

OF_CLASSES = (
    "accuracy", "balanced_accuracy", "macro_f1", "auroc", "average_precision", "log_loss", "brier", "calibration_error",
)  # fmt: skip
OF_NUMBERS = ("mse", "rmse", "mae", "r2", "coverage_90", "width_90")

HALF_WIDTH_90 = 1.6448536269514722
"""Deviations of a normal distribution to each side of its mean that hold 90 % of it."""
_BINS = 10
_LEAST = float(np.finfo(np.float64).eps)


def names(kind: str) -> tuple[str, ...]:
    """Return the names of the scores of data of this kind, "classification" or "regression"."""
    return OF_CLASSES if kind == "classification" else OF_NUMBERS


def of_classes(y: NDArray[np.int64], probabilities: Array) -> dict[str, float]:
    """Return all scores of `probabilities` [n, classes] for the true classes `y` [n], n at least 1.

    Macro scores are means over the classes that occur among `y`, macro F1 also over those that were predicted. With two
    classes, `average_precision` is of the second. `calibration_error`: mean distance of confidence from accuracy over ten
    bins of equal width (Guo, Pleiss, Sun, Weinberger 2017, Equation 3). `brier`: sum over classes; half of it with two, as
    is usual.
    """
    n, classes = probabilities.shape
    predicted = probabilities.argmax(axis=1)  # ties go to the first class
    counts = np.zeros((classes, classes))
    np.add.at(counts, (y, predicted), 1)
    hits, true, said = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    f1 = 2 * hits / np.maximum(true + said, 1)
    ranked = [_ranked(y == one, probabilities[:, one]) for one in range(classes)]
    known = np.array([roc for roc, _ in ranked])
    precision = np.array([average for _, average in ranked])
    own = probabilities[np.arange(n), y]
    one_hot = np.eye(classes)[y]
    return {
        "accuracy": float((predicted == y).mean()),
        "balanced_accuracy": float((hits[true > 0] / true[true > 0]).mean()),
        "macro_f1": float(f1[true + said > 0].mean()),
        "auroc": _mean(known),
        "average_precision": float(precision[1]) if classes == 2 else _mean(precision),
        "log_loss": float(-np.log(np.clip(own, _LEAST, 1)).mean()),
        "brier": float(np.square(probabilities - one_hot).sum(axis=1).mean()) / (2 if classes == 2 else 1),
        "calibration_error": _calibration_error(probabilities.max(axis=1), predicted == y),
    }


def of_numbers(y: Array, predictions: Array, deviations: Array | None, unit: float = 1.0) -> dict[str, float]:
    """Return all scores of `predictions` [n] for `y` [n], both standardised; `unit`: what one of them is in the target's unit.

    `mse` is of the standardised numbers, all others are in the target's unit. `deviations` [n]: of normal predictions, for the
    intervals that should hold 90 %; None: there are none.
    """
    errors = predictions - y
    squared = np.square(errors).mean()
    spread = np.square(y - y.mean()).mean()
    covered, width = np.nan, np.nan
    if deviations is not None:
        half = HALF_WIDTH_90 * deviations
        covered, width = float((np.abs(errors) <= half).mean()), float(2 * half.mean() * unit)
    return {
        "mse": float(squared),
        "rmse": float(np.sqrt(squared) * unit),
        "mae": float(np.abs(errors).mean() * unit),
        "r2": float(1 - squared / spread) if spread > _LEAST else np.nan,
        "coverage_90": covered,
        "width_90": width,
    }


def _mean(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _ranked(is_class: NDArray[np.bool_], scores: Array) -> tuple[float, float]:
    """Return (area under the ROC curve, average precision) of one class against the others; NaN where one side is missing."""
    positives = int(is_class.sum())
    negatives = len(is_class) - positives
    if not positives:
        return np.nan, np.nan
    values, place = np.unique(scores, return_inverse=True)
    here = np.bincount(place, weights=is_class, minlength=len(values))[::-1]  # the highest score first
    all_here = np.bincount(place, minlength=len(values))[::-1]
    found, taken = np.cumsum(here), np.cumsum(all_here)
    average = float((here / positives * found / taken).sum())
    if not negatives:
        return np.nan, average
    # Of every pair of a positive and a negative the positive is above (1), at the same height (1/2) or below.
    wins = (here * (negatives - (taken - found) + (all_here - here) / 2)).sum()
    return float(wins / positives / negatives), average


def _calibration_error(confidence: Array, right: NDArray[np.bool_]) -> float:
    place = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    gaps = np.bincount(place, weights=confidence - right, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(right))
