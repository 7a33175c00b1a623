"""95 % intervals: of a mean over few independent values, Student's t (Gosset 1908, "The Probable Error of a Mean"); of a share,
Wilson's (1927, "Probable Inference, the Law of Succession, and Statistical Inference").
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np

LEVEL = 0.95
_NORMAL = 1.959963984540054
"""Deviations to each side that a normally distributed variable stays within at LEVEL."""
_MANY = 500
"""Degrees of freedom from which a series in 1 / degrees is exact to seven digits."""


def half_width(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return half of the 95 % interval of the mean over the first axis of `values` [n, ...]; NaN for n = 1.

    t * s / sqrt(n), where s is the standard deviation (n - 1) and t the quantile of Student's
    distribution with n - 1 degrees of freedom: 4.30 for three values, 2.36 for eight, 2.05 for
    thirty. Exact for normally distributed values.
    """
    n = len(values)
    if n < 2:
        return np.full(values.shape[1:], np.nan)
    result: np.ndarray[Any, Any] = t_quantile(n - 1) * np.asarray(values.std(axis=0, ddof=1)) / math.sqrt(n)
    return result


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a probability of which `share` of n independent trials came true, n above 0.

    (share + z^2 / 2n -+ z sqrt(share (1 - share) / n + z^2 / 4n^2)) / (1 + z^2 / n): also where all or none came true.
    """
    z2 = _NORMAL**2 / n
    middle = share + z2 / 2
    half = math.sqrt(z2 * share * (1 - share) + z2**2 / 4)
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


@lru_cache(maxsize=256)
def t_quantile(degrees: int) -> float:
    """Return the t that a variable of Student's distribution, with these degrees of freedom, stays within at LEVEL."""
    if degrees > _MANY:
        z = _NORMAL
        return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < LEVEL else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """Return P(|T| < sqrt(degrees) * tan(angle)), by Abramowitz and Stegun 26.7.3 and 26.7.4."""
    odd, cosine = degrees % 2, math.cos(angle)
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series
