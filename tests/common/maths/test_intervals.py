"""Student's t against a printed table, and the share of simulated intervals that hold the true mean."""

import numpy as np
import pytest

from quickbloom.common.maths.intervals import half_width, t_quantile, wilson
from quickbloom.common.metric import ACCURACY
from quickbloom.server_app.runs.directory import spread


# Two-sided 5 % points: Fisher and Yates, "Statistical Tables", table III.
@pytest.mark.parametrize(
    ("degrees", "point"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (10, 2.228), (29, 2.045), (60, 2.0), (120, 1.98)],
)
def test_the_quantiles_are_those_of_the_table(degrees: int, point: float) -> None:
    assert t_quantile(degrees) == pytest.approx(point, abs=5e-4)


def test_the_quantiles_agree_with_scipy_where_the_series_begins() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 5, 44, 499, 500, 501, 502, 2000, 10**6):
        assert t_quantile(degrees) == pytest.approx(float(stats.t.ppf(0.975, degrees)), abs=1e-7)


def covered(draw: np.ndarray, mean: float) -> float:
    """The share of the simulations, `draw` [tasks, simulations], whose interval as of a summary holds the mean."""
    found = spread(draw, ACCURACY)
    return float((np.abs(np.array(found["mean"]) - mean) <= np.array(found["ci95"]) + 1e-6).mean())


@pytest.mark.parametrize("tasks", [3, 8, 30])
def test_95_of_100_intervals_hold_the_mean(tasks: int) -> None:
    # 40,000 simulations: the share is off by 0.0011 (one deviation). 1.96 standard errors hold it in 81, 91 and 94 of 100.
    draw = np.random.default_rng(tasks).normal(0.7, 0.1, (tasks, 40_000))
    assert covered(draw, 0.7) == pytest.approx(0.95, abs=0.0045)


@pytest.mark.parametrize("tasks", [3, 8, 30])
def test_intervals_of_accuracies_hold_it_nearly_as_often(tasks: int) -> None:
    # Clients of different worth, 20 test examples each: skewed, discrete and cut off at 1.
    source = np.random.default_rng(tasks)
    worth = source.beta(7, 3, (tasks, 40_000))
    assert covered(source.binomial(20, worth) / 20, 0.7) == pytest.approx(0.95, abs=0.02)


def test_one_value_has_no_interval() -> None:
    assert np.isnan(half_width(np.array([[0.3, 0.4]]))).all()
    assert half_width(np.array([[0.5], [0.5]])).tolist() == [0.0]


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (3, 4), (47, 60), (60, 60), (0, 500)])
def test_shares_have_the_ends_at_which_a_test_of_the_share_is_just_not_rejected(hits: int, n: int) -> None:
    """|share - p| = z sqrt(p (1 - p) / n) at both ends p: how Wilson defines them."""
    for end in wilson(hits / n, n):
        assert abs(hits / n - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / n), abs=1e-7)


def test_shares_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(47, 60).proportion_ci(method="wilson")
    assert wilson(47 / 60, 60) == pytest.approx((theirs.low, theirs.high))
