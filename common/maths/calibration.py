"""How sure a classifier may be: the factor on its outputs before the softmax, found on rows that it did not learn from.

The inverse of the temperature of Guo, Pleiss, Sun, Weinberger 2017, "On Calibration of Modern Neural Networks".
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEAST, MOST = 1e-2, 1e3
"""Bounds of the factor."""
UNREACHABLE = -1e20
"""Outputs below this are of classes that a model cannot predict."""
_HALVINGS = 60


def softmax(logits: Array) -> Array:
    """Return probabilities [n, classes]; NaN where a row of logits is not finite above."""
    with np.errstate(invalid="ignore"):
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: Array = powers / powers.sum(axis=1, keepdims=True)
    return shares


def smoothed(labels: NDArray[np.int64], reachable: NDArray[np.bool_]) -> Array:
    """Return what n rows allow to be sure of: (n + 1) / (n + 2) for a row's class, the rest for the others [n, classes].

    As Platt 1999 does, "Probabilistic Outputs for Support Vector Machines": else few rows that are all right would
    say that nothing is ever wrong. `reachable` [n, classes]: which classes a row may be given.
    """
    n = len(labels)
    wanted: Array = reachable / (n + 2) / np.maximum(reachable.sum(axis=1, keepdims=True) - 1, 1)
    wanted[np.arange(n), labels] = (n + 1) / (n + 2)
    return wanted


def softmax_scale(outputs: Array, labels: NDArray[np.int64]) -> float:
    """Return the factor s in [0.01, 1000] with the least log loss of softmax(s outputs) against the `smoothed` labels.

    `outputs` [n, classes], finite, of rows that the model did not learn from; `labels` [n], positions among the classes. The
    log loss is convex in s, so the interval in which its slope changes sign is halved. 1 if no row tells anything: none,
    or outputs that are all alike.
    """
    reachable, centred = _centred(outputs)
    if not centred.any():
        return 1.0
    wanted = float((smoothed(labels, reachable) * centred).sum())

    def slope(scale: float) -> float:
        shares = reachable * np.exp(scale * centred)
        return float(((shares * centred).sum(axis=1) / shares.sum(axis=1)).sum()) - wanted

    low, high = np.log(LEAST), np.log(MOST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def log_loss(outputs: Array, labels: NDArray[np.int64], scale: float) -> float:
    """Return the sum over rows of the log loss that `softmax_scale` makes the least of, in nats."""
    reachable, centred = _centred(outputs)
    logs = scale * centred - np.log((reachable * np.exp(scale * centred)).sum(axis=1, keepdims=True))
    return -float((smoothed(labels, reachable) * logs).sum())


def _centred(outputs: Array) -> tuple[NDArray[np.bool_], Array]:
    """Return which classes a row may be given, and its outputs less the largest; 0 for the other classes."""
    reachable = outputs > UNREACHABLE
    return reachable, np.where(reachable, outputs - outputs.max(axis=1, keepdims=True, initial=-np.inf), 0.0)
