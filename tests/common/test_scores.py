"""Scores against scikit-learn's over random cases, with ties and absent classes, and by hand where it has none."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from quickbloom.common import scores

Array = np.ndarray[Any, Any]


def case(seed: int, n: int, classes: int, levels: int) -> tuple[Array, Array]:
    """Labels and probabilities. The fewer levels, the more of them are equal."""
    rng = np.random.default_rng(seed)
    shares = rng.integers(1, levels + 1, size=(n, classes)).astype(float)
    return rng.integers(0, classes, n), shares / shares.sum(axis=1, keepdims=True)


CASES = st.tuples(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 5), st.sampled_from([1, 2, 4, 1000]))


@given(CASES)
@settings(max_examples=300)
def test_scores_of_classes_are_those_of_scikit_learn(drawn: tuple[int, int, int, int]) -> None:
    y, shares = case(*drawn)
    classes = shares.shape[1]
    everything = list(range(classes))
    found = scores.of_classes(y, shares)
    said = shares.argmax(axis=1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(y, said))
    # The recall of every class that is there: scikit-learn's own function warns where others were predicted.
    here = np.unique(y)
    recalls = metrics.recall_score(y, said, labels=here, average=None, zero_division=0)
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(y, said, average="macro"))
    assert found["log_loss"] == pytest.approx(metrics.log_loss(y, shares, labels=everything))
    one_hot = np.eye(classes)[y]
    if classes == 2:
        assert found["brier"] == pytest.approx(metrics.brier_score_loss(y, shares[:, 1], pos_label=1))
        if len(here) == 2:
            assert found["auroc"] == pytest.approx(metrics.roc_auc_score(y, shares[:, 1]))
            assert found["average_precision"] == pytest.approx(metrics.average_precision_score(y, shares[:, 1]))
    else:
        assert found["brier"] == pytest.approx(metrics.brier_score_loss(y, shares, labels=everything, scale_by_half=False))
        known = [one for one in here if len(here) > 1]
        by_class = [metrics.roc_auc_score(one_hot[:, one], shares[:, one]) for one in known]
        assert found["auroc"] == pytest.approx(np.mean(by_class) if known else np.nan, nan_ok=True)
        precisions = [metrics.average_precision_score(one_hot[:, one], shares[:, one]) for one in here]
        assert found["average_precision"] == pytest.approx(np.mean(precisions))


@given(CASES)
def test_the_area_is_the_share_of_pairs_in_the_right_order(drawn: tuple[int, int, int, int]) -> None:
    """By counting pairs one by one: 1 where the row of the class is above, 1/2 at the same height."""
    y, shares = case(*drawn)
    areas = []
    for one in range(shares.shape[1]):
        pairs = [
            (a > b) + 0.5 * (a == b)
            for a, mine in zip(shares[:, one], y == one, strict=True)
            for b, other in zip(shares[:, one], y != one, strict=True)
            if mine and other
        ]
        areas += [np.mean(pairs)] if pairs else []
    assert scores.of_classes(y, shares)["auroc"] == pytest.approx(np.mean(areas) if areas else np.nan, nan_ok=True)


def test_balanced_accuracy_is_scikit_learns_own_where_every_class_is_there() -> None:
    y = np.array([0, 0, 0, 0, 1, 1, 2])
    shares = np.eye(3)[[0, 0, 0, 1, 1, 2, 2]]
    found = scores.of_classes(y, shares)["balanced_accuracy"]
    assert found == pytest.approx(metrics.balanced_accuracy_score(y, shares.argmax(axis=1)))
    assert found == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)


def test_rows_of_one_class_have_no_area_and_an_absent_class_does_not_count() -> None:
    alone = scores.of_classes(np.array([0, 0]), np.array([[0.9, 0.1], [0.4, 0.6]]))
    assert np.isnan(alone["auroc"])
    assert np.isnan(alone["average_precision"])  # there is no row of the second class to find
    assert (alone["accuracy"], alone["balanced_accuracy"]) == (0.5, 0.5)
    assert alone["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)  # class 1 was predicted once, and counts
    assert scores.of_classes(np.array([1, 1]), np.array([[0.9, 0.1], [0.4, 0.6]]))["average_precision"] == 1.0
    # Three classes of which the third is neither there nor predicted.
    y, shares = np.array([0, 1, 1]), np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
    found = scores.of_classes(y, shares)
    assert found["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found["auroc"] == 1.0
    (row,) = [scores.of_classes(np.array([1]), np.array([[0.25, 0.75]]))]
    assert row["log_loss"] == pytest.approx(-np.log(0.75))
    assert row["brier"] == pytest.approx(0.0625)
    assert row["calibration_error"] == pytest.approx(0.25)


def test_a_class_that_was_certainly_excluded_costs_a_finite_loss() -> None:
    loss = scores.of_classes(np.array([0, 1]), np.array([[0.0, 1.0], [0.5, 0.5]]))["log_loss"]
    assert np.isfinite(loss)
    assert loss == pytest.approx((-np.log(np.finfo(float).eps) - np.log(0.5)) / 2)


def test_the_calibration_error_by_hand() -> None:
    """Confidences 0.55 and 0.6 fall into (0.5, 0.6], 0.95 and 1 into (0.9, 1]; right are the first, the third, the fourth."""
    confidence, right = np.array([0.55, 0.6, 0.95, 1.0]), np.array([1, 0, 1, 1])
    shares = np.stack([confidence, 1 - confidence], axis=1)
    found = scores.of_classes(1 - right, shares)["calibration_error"]
    first, second = abs(0.55 + 0.6 - 1) / 2, abs(0.95 + 1.0 - 2) / 2
    assert found == pytest.approx(0.5 * first + 0.5 * second)
    # On the whole right half of the time with 0.5: no error, though no single row is met.
    assert scores.of_classes(np.array([0, 1]), np.full((2, 2), 0.5))["calibration_error"] == 0.0


@given(st.integers(0, 10**6), st.integers(2, 40), st.sampled_from([1.0, 12.5, 1e-3]))
def test_scores_of_numbers_are_those_of_scikit_learn_in_the_targets_unit(seed: int, n: int, unit: float) -> None:
    rng = np.random.default_rng(seed)
    y = rng.normal(size=n)
    said = y + rng.normal(size=n)
    found = scores.of_numbers(y, said, None, unit)
    assert found["mse"] == pytest.approx(metrics.mean_squared_error(y, said))
    assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(unit * y + 7, unit * said + 7))
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(unit * y + 7, unit * said + 7))
    assert found["r2"] == pytest.approx(metrics.r2_score(unit * y + 7, unit * said + 7))
    assert np.isnan(found["coverage_90"])
    assert np.isnan(found["width_90"])


def test_intervals_by_hand_and_by_scipys_normal_distribution() -> None:
    stats = pytest.importorskip("scipy.stats")
    y, said, deviations = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.6, 1.0, 0.0, 3.1]), np.array([1.0, 0.1, 1.0, 0.05])
    ends = [stats.norm(mean, deviation).interval(0.9) for mean, deviation in zip(said, deviations, strict=True)]
    inside = [low <= value <= high for value, (low, high) in zip(y, ends, strict=True)]
    assert inside == [True, True, False, False]
    found = scores.of_numbers(y, said, deviations, 10.0)
    assert found["coverage_90"] == 0.5
    assert found["width_90"] == pytest.approx(10 * np.mean([high - low for low, high in ends]))


def test_numbers_without_spread_have_no_share_of_it() -> None:
    assert np.isnan(scores.of_numbers(np.array([2.0, 2.0]), np.array([2.0, 3.0]), None)["r2"])
    assert np.isnan(scores.of_numbers(np.array([2.0]), np.array([3.0]), None)["r2"])


def test_names_are_the_keys_in_order() -> None:
    y, shares = case(0, 9, 3, 4)
    assert tuple(scores.of_classes(y, shares)) == scores.names("classification") == scores.OF_CLASSES
    assert tuple(scores.of_numbers(np.zeros(2), np.ones(2), None)) == scores.names("regression") == scores.OF_NUMBERS
