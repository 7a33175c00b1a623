"""One linear model from the sums of many nodes: scikit-learn's on all rows in one place."""

from typing import Any

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from quickbloom.common.baselines.global_ridge import NEVER, PENALTIES, GlobalModel, Sums, fit

Array = np.ndarray[Any, Any]


def rows(n: int, d: int, seed: int, noise: float = 0.5) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(3, 2, size=(n, d))
    return x, x @ rng.normal(size=(d, 2)) + 5 + noise * rng.normal(size=(n, 2))


def joined(x: Array, y: Array, parts: int, seed: int = 0) -> Sums:
    """The sums of nodes with unlike numbers of rows."""
    where = np.sort(np.random.default_rng(seed).choice(np.arange(1, len(x)), parts - 1, replace=False))
    pairs = zip(np.split(x, where), np.split(y, where), strict=True)
    return Sums.joined([Sums.of(*pair) for pair in pairs])


def cross_validated(x: Array, y: Array, penalty: float) -> float:
    """Generalised cross-validation by its definition: the hat matrix of the model with an intercept, written out."""
    n = len(x)
    centred = x - x.mean(axis=0)
    hat = centred @ np.linalg.inv(centred.T @ centred + penalty * np.eye(x.shape[1])) @ centred.T + 1 / n
    residual = np.square(y - hat @ y).sum()
    free = 1 - np.trace(hat) / n
    return float(residual / n / free**2)


@pytest.mark.parametrize(("n", "d", "noise"), [(200, 4, 0.5), (40, 12, 20.0), (12, 9, 3.0)])
def test_it_is_scikit_learns_ridge_on_all_rows_with_the_penalty_of_the_least_cross_validation(
    n: int, d: int, noise: float
) -> None:
    x, y = rows(n, d, seed=n, noise=noise)
    penalty = min(PENALTIES, key=lambda one: cross_validated(x, y, one))
    theirs = Ridge(penalty, solver="cholesky").fit(x, y)
    found = fit(joined(x, y, 5), classes=False)
    assert found is not None
    np.testing.assert_allclose(found.weights, theirs.coef_.T, atol=1e-8)
    np.testing.assert_allclose(found.intercept, theirs.intercept_, atol=1e-8)
    fresh = np.random.default_rng(1).normal(3, 2, size=(20, d))
    np.testing.assert_allclose(found.outputs(fresh), theirs.predict(fresh), atol=1e-8)


def test_noise_alone_is_shrunk_to_nothing() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 20))
    y = rng.normal(size=(60, 1))
    best = min(PENALTIES, key=lambda one: cross_validated(x, y, one))
    found = fit(joined(x, y, 3), classes=False)
    assert found is not None
    np.testing.assert_allclose(found.weights[:, 0], Ridge(best).fit(x, y[:, 0]).coef_, atol=1e-8)
    assert np.abs(found.weights).max() < 0.1


def test_it_does_not_matter_how_rows_are_spread_over_nodes() -> None:
    x, y = rows(50, 6, seed=2)
    one, many = (fit(joined(x, y, parts), classes=False) for parts in (2, 40))
    assert one is not None
    assert many is not None
    np.testing.assert_allclose(one.weights, many.weights, rtol=1e-9)


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.8, 0.15, 0.05]])
def test_classes_are_those_of_linear_discriminant_analysis(shares: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quickbloom.common.baselines.global_ridge.PENALTIES", (1e-9,))
    rng = np.random.default_rng(7)
    labels = rng.choice(len(shares), size=400, p=shares)
    x = rng.normal(size=(400, 3)) @ rng.normal(size=(3, 3)) + 2 * np.eye(len(shares), 3)[labels]
    found = fit(joined(x, np.eye(len(shares))[labels], 6), classes=True)
    assert found is not None
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x, labels)
    logits = found.outputs(x)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(powers / powers.sum(axis=1, keepdims=True), theirs.predict_proba(x), atol=1e-6)
    np.testing.assert_allclose(found.shares, np.bincount(labels) / 400)


def test_a_class_without_a_row_is_never_predicted() -> None:
    x = np.array([[0.0], [1.0], [4.0], [5.0]])
    found = fit(Sums.of(x, np.eye(3)[[0, 0, 2, 2]]), classes=True)
    assert found is not None
    assert found.shares.tolist() == [0.5, 0.0, 0.5]
    logits = found.outputs(np.array([[0.5], [4.5], [1e6]]))
    assert (logits[:, 1] == NEVER).all()
    assert logits.argmax(axis=1).tolist() == [0, 2, 2]


@pytest.mark.parametrize(("y", "level"), [([[4.0]], 4.0), ([[1.0], [1.0], [1.0]], 1.0)])
def test_one_row_or_equal_targets_are_a_constant(y: list[list[float]], level: float) -> None:
    x = np.arange(len(y), dtype=float)[:, None]
    found = fit(Sums.of(x, np.array(y)), classes=False)
    assert found is not None
    np.testing.assert_allclose(found.outputs(np.array([[0.0], [50.0]])), level, atol=1e-9)


def spoilt(**parts: Array) -> Sums:
    x, y = rows(20, 3, seed=0)
    return Sums(**{**vars(Sums.of(x, y)), **parts})


@pytest.mark.parametrize(
    "sums",
    [
        spoilt(gram=np.zeros((4, 4))),
        spoilt(gram=np.full((4, 4), np.inf)),
        spoilt(gram=np.full((4, 4), 1e300)),
        spoilt(gram=-np.eye(4)),
        spoilt(cross=np.full((4, 2), np.nan)),
        spoilt(cross=np.full((4, 2), 1e308)),
        spoilt(gram=np.diag([1.0, 1.0, 1.0, 1e308])),
    ],
    ids=["no row", "infinite", "huge", "negative", "unknown", "huge targets", "many rows"],
)
@pytest.mark.parametrize("classes", [False, True])
def test_sums_of_no_rows_are_no_model_or_a_finite_one(sums: Sums, classes: bool) -> None:
    with np.errstate(all="ignore"):
        found = fit(sums, classes=classes)
    assert found is None or (isinstance(found, GlobalModel) and all(np.isfinite(part).all() for part in vars(found).values()))


def test_numbers_of_rows_of_classes_must_give_that_of_all() -> None:
    x, _ = rows(20, 3, seed=0)
    sums = Sums.of(x, np.eye(2)[np.arange(20) % 2])
    assert fit(sums, classes=True) is not None
    assert fit(Sums(sums.gram, sums.cross * 2, sums.squares), classes=True) is None
    minus = sums.cross.copy()
    minus[-1] = [-5, 25]
    assert fit(Sums(sums.gram, minus, sums.squares), classes=True) is None
