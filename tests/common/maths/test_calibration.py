"""The factor on outputs before the softmax, against the least log loss worked out otherwise."""

import numpy as np
import pytest

from quickbloom.common.maths.calibration import MOST, log_loss, softmax_scale


def test_two_alike_outputs_have_the_scale_that_says_how_often_they_are_right() -> None:
    """Outputs of 0 and 1, right in 70 of 100 rows: e^s / (1 + e^s) is 0.7, each row being sure of 101/102."""
    labels = np.arange(100) % 2
    outputs = np.eye(2)[np.where(np.arange(100) < 70, labels, 1 - labels)]
    share = 0.7 * 101 / 102 + 0.3 / 102
    assert softmax_scale(outputs, labels) == pytest.approx(np.log(share / (1 - share)), rel=1e-9)


def test_classes_that_cannot_be_predicted_do_not_count() -> None:
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(50, 2)), rng.integers(0, 2, 50)
    wider = np.concatenate([outputs, np.full((50, 1), -1e30)], axis=1)
    outputs[np.arange(50), labels] += 1
    wider[:, :2] = outputs
    assert softmax_scale(wider, labels) == pytest.approx(softmax_scale(outputs, labels))
    assert log_loss(wider, labels, 2.0) == pytest.approx(log_loss(outputs, labels, 2.0))


def test_the_scale_is_a_minimum_of_the_log_loss() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 80)
    outputs = rng.normal(size=(80, 4)) + 2 * np.eye(4)[labels]
    scale = softmax_scale(outputs, labels)
    least = log_loss(outputs, labels, scale)
    assert all(log_loss(outputs, labels, factor * scale) > least for factor in (0.9, 0.99, 1.01, 1.1))
    assert softmax_scale(10 * outputs, labels) == pytest.approx(scale / 10)


def test_no_rows_and_outputs_that_are_all_alike_change_nothing() -> None:
    assert softmax_scale(np.zeros((0, 2)), np.zeros(0, dtype=np.int64)) == 1
    assert softmax_scale(np.ones((5, 2)), np.zeros(5, dtype=np.int64)) == 1


def test_outputs_far_beyond_what_a_float_can_hold_after_exp_are_taken() -> None:
    labels = np.arange(30) % 2
    assert softmax_scale(1e6 * np.eye(2)[labels], labels) == pytest.approx(0.01)
    assert softmax_scale(1e-6 * np.eye(2)[labels], labels) == pytest.approx(MOST)
