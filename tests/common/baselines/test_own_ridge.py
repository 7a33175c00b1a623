"""Ridge on a task's own rows, against scikit-learn and against models that are fitted anew without each row."""

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifierCV, RidgeCV

from quickbloom.common.baselines.own_ridge import PENALTIES, OwnRidge, fit_classes, fit_numbers

Array = np.ndarray[Any, Any]


def data(n: int, d: int, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return x, x[:, 0] - 0.5 * x[:, -1] + 3 + 0.5 * rng.normal(size=n)


@pytest.mark.parametrize(("n", "d"), [(40, 3), (12, 30), (2, 5), (3, 1), (60, 59)])
def test_penalty_errors_and_coefficients_are_those_of_ridge_cv(n: int, d: int) -> None:
    x, y = data(n, d)
    theirs = RidgeCV(PENALTIES, store_cv_results=True).fit(x, y)
    for place, penalty in enumerate(PENALTIES):
        ours = fit_numbers(x, y, [penalty])
        np.testing.assert_allclose(np.square(ours.left_out[:, 0] - y), theirs.cv_results_[:, place], rtol=1e-5, atol=1e-9)
    found = fit_numbers(x, y)
    if n == 2:  # a model of one row is a constant, whatever the penalty: of equals, the largest
        assert found.penalty == max(PENALTIES)
        return
    assert found.penalty == pytest.approx(theirs.alpha_)
    np.testing.assert_allclose(found.coefficients[:, 0], theirs.coef_, atol=1e-8)
    np.testing.assert_allclose(found.outputs(x)[:, 0], theirs.predict(x), atol=1e-8)


@pytest.mark.parametrize("penalty", [1e-4, 1.0, 1e5])
def test_left_out_predictions_are_those_of_models_without_the_row(penalty: float) -> None:
    x, y = data(9, 20, seed=1)
    found = fit_numbers(x, y, [penalty])
    for i in range(9):
        others = np.arange(9) != i
        model = Ridge(penalty).fit(x[others], y[others])
        assert found.left_out[i, 0] == pytest.approx(model.predict(x[[i]])[0], abs=1e-7)


def test_a_nearly_redundant_column_costs_nothing() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    pair = np.stack([x, x + 0.01 * rng.normal(size=200)], axis=1)
    y = 100 * (pair[:, 1] - pair[:, 0])
    found = fit_numbers(pair[:100], y[:100])
    assert found.penalty < 1e-5
    error = np.square(found.outputs(pair[100:])[:, 0] - y[100:]).mean()
    assert error < 1e-4 * y[100:].var()


@pytest.mark.parametrize("count", [2, 3])
def test_classes_are_chosen_as_by_ridge_classifier_cv(count: int) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(50, 4))
    labels = (x[:, :count] + 0.7 * rng.normal(size=(50, count))).argmax(axis=1)
    found = fit_classes(x, labels, count)
    # The same squares: their targets of -1 and 1 are twice the one-hot ones, less 1.
    theirs = RidgeClassifierCV(PENALTIES).fit(x, labels)
    assert found.penalty == pytest.approx(theirs.alpha_)
    assert (found.outputs(x).argmax(axis=1) == theirs.predict(x)).all()
    np.testing.assert_allclose((found.outputs(x) / found.scale).sum(axis=1), 1, atol=1e-9)


def log_loss(model: OwnRidge, labels: Array, scale: float) -> float:
    """Log loss of the left-out rows against labels of which one in n + 2 may be wrong, written out."""
    outputs = scale * model.left_out
    logs = outputs - np.log(np.exp(outputs).sum(axis=1, keepdims=True))
    n, classes = outputs.shape
    wanted = np.full_like(outputs, 1 / (n + 2) / (classes - 1))
    wanted[np.arange(n), labels] = 1 - 1 / (n + 2)
    return float(-(wanted * logs).sum(axis=1).mean())


def test_the_scale_has_the_least_log_loss_of_the_left_out_rows() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(40, 3))
    labels = (x[:, 0] + rng.normal(size=40) > 0).astype(int)
    found = fit_classes(x, labels, 2)
    grid = np.geomspace(1e-2, 1e2, 8_001)
    best = grid[np.argmin([log_loss(found, labels, scale) for scale in grid])]
    assert found.scale == pytest.approx(best, rel=1e-3)
    # One number decides: with two classes it is a logistic regression without an intercept on the difference of the outputs.
    difference = found.left_out[:, 1] - found.left_out[:, 0]
    doubled, y = np.concatenate([difference, difference])[:, None], np.repeat([0, 1], 40)
    sure = 1 - 1 / 42
    weight = np.concatenate([np.where(labels == 0, sure, 1 - sure), np.where(labels == 1, sure, 1 - sure)])
    theirs = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(doubled, y, sample_weight=weight)
    assert found.scale == pytest.approx(float(theirs.coef_[0, 0]), rel=1e-4)


def test_rows_that_are_all_right_do_not_make_it_certain() -> None:
    x = np.array([[-1.0], [-1.1], [1.0], [1.1]])
    found = fit_classes(x, [0, 0, 1, 1], 2)
    shares = np.exp(found.left_out_outputs)
    right = (shares / shares.sum(axis=1, keepdims=True))[np.arange(4), [0, 0, 1, 1]]
    assert right.mean() == pytest.approx(5 / 6, abs=0.01)  # (n + 1) / (n + 2)


def test_one_row_and_columns_without_spread_give_the_constant() -> None:
    one = fit_numbers([[2.0, 3.0]], [5.0])
    assert one.outputs([[9.0, -9.0]]).tolist() == [[5.0]]
    assert np.isnan(one.left_out).all()
    flat = fit_numbers(np.ones((4, 2)), [1.0, 2.0, 3.0, 6.0])
    assert flat.penalty == max(PENALTIES)
    assert flat.outputs([[1.0, 1.0]])[0, 0] == pytest.approx(3)
    np.testing.assert_allclose(flat.left_out[:, 0], [11 / 3, 10 / 3, 3, 2])
    single = fit_classes([[1.0]], [2], 3)
    assert single.outputs([[4.0]]).argmax() == 2
    assert single.scale == 1.0


def test_a_class_without_a_row_has_no_output() -> None:
    x, _ = data(20, 3)
    found = fit_classes(x, (x[:, 0] > 0) * 2, 3)
    np.testing.assert_allclose(found.outputs(x)[:, 1], 0, atol=1e-12)


def test_several_targets_share_one_penalty() -> None:
    x, y = data(30, 6)
    both = np.stack([y, x[:, 1] ** 2], axis=1)
    found = fit_numbers(x, both)
    errors = [np.square(fit_numbers(x, both, [penalty]).left_out - both).mean() for penalty in PENALTIES]
    assert found.penalty == pytest.approx(PENALTIES[int(np.argmin(errors))])
