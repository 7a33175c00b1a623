"""What a task's baselines predict, by hand and by brute force; what cannot be known is NaN."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor, NearestCentroid

from quickbloom.common import scores
from quickbloom.common.baselines import simple
from quickbloom.common.baselines.global_ridge import GlobalModel
from quickbloom.common.baselines.own_ridge import PENALTIES
from quickbloom.common.baselines.scoring import BASELINES, CONTENDERS, IN_WORDS, TITLES, Outputs, scores_of_draw
from quickbloom.common.maths.batch import Batch, TaskData

Array = np.ndarray[Any, Any]
NOTHING = GlobalModel(np.zeros((2, 1)), np.zeros(1), np.array([]))


def batch(x: Array, y: Array) -> Batch:
    wanted = torch.tensor(y) if y.dtype.kind == "i" else torch.tensor(y, dtype=torch.float32)[:, None]
    return Batch.of(torch.tensor(x, dtype=torch.float32), wanted)


def draw_of(support: tuple[Array, Array], test: tuple[Array, Array]) -> TaskData:
    return TaskData(batch(*support), batch(*support), batch(*test))


def numbers(seed: int = 0, n: int = 12) -> TaskData:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * n, 2)).astype(np.float32)
    y = (x[:, 0] + 3 + 0.3 * rng.normal(size=2 * n)).astype(np.float32)
    return draw_of((x[:n], y[:n]), (x[n:], y[n:]))


def of(found: Array, contender: str, score: str, kind: str = "regression") -> float:
    return float(found[CONTENDERS.index(contender), scores.names(kind).index(score)])


def scored(draw: TaskData, shared: GlobalModel | None, *, ordered: bool = True, unit: float = 1.0, **more: Any) -> Array:
    n = len(draw.test.y)
    zeros = np.zeros((n, 1))
    return scores_of_draw(draw, replace(Outputs(zeros, zeros), **more), shared, 0, unit, ordered=ordered)


def test_baselines_of_numbers_by_hand_and_by_scikit_learn() -> None:
    draw = numbers()
    x, y = draw.support.x.numpy(), draw.support.y.numpy()[:, 0].astype(float)
    fresh, wanted = draw.test.x.numpy(), draw.test.y.numpy()[:, 0].astype(float)
    shared = GlobalModel(np.array([[0.5], [1.0]]), np.array([2.0]), np.array([]))
    found = scored(draw, shared, unit=10.0)
    by_all = fresh @ shared.weights[:, 0] + 2.0
    offset = (y - (x @ shared.weights[:, 0] + 2.0)).mean()
    expected = {
        "before": np.zeros(12),
        "after": np.zeros(12),
        "constant": np.full(12, y.mean()),
        "last": np.full(12, y[-1]),
        "nearest": KNeighborsRegressor(1).fit(x, y).predict(fresh),
        "own": RidgeCV(PENALTIES).fit(x.astype(float), y).predict(fresh.astype(float)),
        "global": by_all,
        "global_offset": by_all + offset,
    }
    assert expected.keys() == set(CONTENDERS) - {"prototypes"}  # which classes alone have
    for name, values in expected.items():
        assert of(found, name, "rmse") == pytest.approx(10 * np.sqrt(np.mean((values - wanted) ** 2)), rel=1e-6), name
        assert of(found, name, "mse") == pytest.approx(np.mean((values - wanted) ** 2), rel=1e-6), name


def softmax(logits: Array) -> Array:
    shares: Array = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return shares


def test_baselines_of_classes_by_hand() -> None:
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(16, 2)).astype(np.float32), np.array([0, 0, 0, 2, 0, 2, 0, 0] * 2)
    draw = draw_of((x[:8], labels[:8]), (x[8:], labels[8:]))
    shared = GlobalModel(rng.normal(size=(2, 3)), rng.normal(size=3), np.array([0.5, 0.25, 0.25]))
    model = Outputs(rng.normal(size=(8, 3)), rng.normal(size=(8, 3)))
    found = scores_of_draw(draw, model, shared, 3, 1.0, ordered=True)
    logits = x[8:].astype(float) @ shared.weights + shared.intercept
    # Of 8 rows 6, 0 and 2, drawn to the shares of all by 3 rows: 7.5, 0.75 and 2.75 of 11.
    shift = np.log(np.array([7.5, 0.75, 2.75]) / 11 / np.array([0.5, 0.25, 0.25]))
    nearest = KNeighborsClassifier(1).fit(x[:8], labels[:8]).predict(x[8:])
    closest = NearestCentroid().fit(x[:8], labels[:8]).predict(x[8:])
    expected = {
        "before": softmax(model.before),
        "after": softmax(model.after),
        "constant": np.tile([7 / 11, 1 / 11, 3 / 11], (8, 1)),
        "last": np.tile([9 / 11, 1 / 11, 1 / 11], (8, 1)),
        "nearest": np.where(np.eye(3)[nearest] > 0, 9 / 11, 1 / 11),
        "prototypes": np.where(np.eye(3)[closest] > 0, 9 / 11, 1 / 11),
        "global": softmax(logits),
        "global_offset": softmax(logits + shift),
    }
    for name, shares in expected.items():
        by_hand = scores.of_classes(labels[8:], shares)
        for score, value in by_hand.items():
            assert of(found, name, score, "classification") == pytest.approx(value, nan_ok=True), (name, score)
    own = of(found, "own", "accuracy", "classification")
    assert 0 <= own <= 1


def test_a_class_that_no_training_row_has_stays_out_of_the_offset() -> None:
    """Its logit is as good as minus infinity; the shift must not make it unknown or likely."""
    x, labels = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], dtype=np.float32), np.array([0, 1, 2])
    shared = GlobalModel(np.zeros((2, 3)), np.array([0.0, 0.0, -1e30]), np.array([0.5, 0.5, 0.0]))
    zeros = np.zeros((3, 3))
    found = scores_of_draw(draw_of((x, labels), (x, labels)), Outputs(zeros, zeros), shared, 3, 1.0, ordered=False)
    for name in ("global", "global_offset"):
        assert of(found, name, "accuracy", "classification") == pytest.approx(1 / 3)
        assert np.isfinite(of(found, name, "log_loss", "classification"))


@pytest.mark.parametrize(("m", "n", "d"), [(1, 5, 3), (40, 60, 7), (3, 1, 1)])
def test_the_nearest_row_by_brute_force(m: int, n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(m)
    support, x = rng.normal(size=(m, d)), rng.normal(size=(n, d))
    by_hand = [min(range(m), key=lambda i, row=row: ((support[i] - row) ** 2).sum()) for row in x]  # type: ignore[misc]
    assert simple.nearest(support, x).tolist() == by_hand
    monkeypatch.setattr(simple, "_DISTANCES_AT_ONCE", 7)  # in pieces
    assert simple.nearest(support, x).tolist() == by_hand
    assert simple.nearest(support, x[:0]).tolist() == []


def silent(found: Array) -> set[str]:
    """The contenders of which nothing is known."""
    return {name for name, row in zip(CONTENDERS, found, strict=True) if np.isnan(row).all()}


def test_what_does_not_apply_is_not_known() -> None:
    draw = numbers()

    def unknown(found: Array) -> set[str]:
        return silent(found) - {"prototypes"}  # which classes alone have

    assert unknown(scored(draw, NOTHING)) == set()
    assert unknown(scored(draw, None)) == {"global", "global_offset"}
    assert unknown(scored(draw, NOTHING, ordered=False)) == {"last"}
    n = len(draw.test.y)
    spoilt = np.where(np.arange(n) == 3, np.nan, 0.0)[:, None]
    assert unknown(scored(draw, NOTHING, after=spoilt)) == {"after"}
    assert unknown(scored(draw, NOTHING, before=np.full((n, 1), np.inf))) == {"before"}
    # A deviation belongs to the adapted model alone.
    found = scored(draw, NOTHING, deviation=np.ones(n))
    covered = {name for name in CONTENDERS if not np.isnan(of(found, name, "coverage_90"))}
    assert covered == {"after"}


def test_a_diverged_classifier_is_not_known_rather_than_wrong() -> None:
    x, labels = np.zeros((4, 2), dtype=np.float32), np.array([0, 1, 0, 1])
    zeros = np.zeros((4, 2))
    for bad in (np.nan, np.inf):
        spoilt = np.where(np.arange(4) == 1, bad, 0.0)[:, None] + zeros
        found = scores_of_draw(draw_of((x, labels), (x, labels)), Outputs(zeros, spoilt), None, 2, 1.0, ordered=False)
        assert "after" in silent(found)
        assert "before" not in silent(found)


def test_tokens_have_no_linear_models_and_no_distances() -> None:
    x, labels = torch.tensor([[1, 2], [3, 4], [1, 1]]), torch.tensor([0, 1, 1])
    part = Batch.of(x, labels)
    zeros = np.zeros((3, 5))
    shared = GlobalModel(np.zeros((2, 5)), np.zeros(5), np.full(5, 0.2))
    found = scores_of_draw(TaskData(part, part, part), Outputs(zeros, zeros), shared, 5, 1.0, ordered=False)
    assert silent(found) == {"last", "nearest", "prototypes", "own", "global", "global_offset"}


def test_one_row_is_enough_for_every_baseline() -> None:
    x = np.ones((1, 2), dtype=np.float32)
    found = scored(draw_of((x, np.array([5.0])), (2 * x, np.array([7.0]))), NOTHING)
    for name in ("constant", "last", "nearest", "own", "global_offset"):
        assert of(found, name, "mae") == pytest.approx(2.0), name
        assert np.isnan(of(found, name, "r2"))


def test_every_baseline_has_words() -> None:
    assert ("constant", *TITLES) == ("constant", *IN_WORDS) == BASELINES  # the constant is called by the kind of data
