"""How sure a classifier may be: the factor on its outputs before the softmax, found on rows that it did not learn from.

The inverse of the temperature of Guo, Pleiss, Sun, Weinberger 2017, "On Calibration of Modern Neural Networks".
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEAST, MOST = 1e-2, 1e3
"""Bounds of the factor."""
_HALVINGS = 60


def smoothed(labels: NDArray[np.int64], classes: int) -> Array:
    """Return what n rows allow to be sure of: (n + 1) / (n + 2) for a row's class, the rest for the others [n, classes].

    As Platt 1999 does, "Probabilistic Outputs for Support Vector Machines": else few rows that are all right would
    say that nothing is ever wrong.
    """
    n = len(labels)
    wanted = np.full((n, classes), 1 / (n + 2) / max(classes - 1, 1))
    wanted[np.arange(n), labels] = (n + 1) / (n + 2)
    return wanted


def softmax_scale(outputs: Array, labels: NDArray[np.int64]) -> float:
    """Return the factor s in [0.01, 1000] with the least log loss of softmax(s outputs) against the `smoothed` labels.

    `outputs` [n, classes], of rows that the model did not learn from; `labels` [n], positions among the classes. The
    log loss is convex in s, so its slope is halved in. 1 if no row tells anything: none, or outputs that are all alike.
    """
    centred = outputs - outputs.max(axis=1, keepdims=True, initial=-np.inf)
    if not len(outputs) or not np.isfinite(centred).all() or not centred.any():
        return 1.0
    wanted = (smoothed(labels, outputs.shape[1]) * centred).sum()

    def slope(scale: float) -> float:
        shares = np.exp(scale * centred)
        return float((shares * centred).sum(axis=1) @ (1 / shares.sum(axis=1)) - wanted)

    low, high = np.log(LEAST), np.log(MOST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    return float(np.exp((low + high) / 2))
